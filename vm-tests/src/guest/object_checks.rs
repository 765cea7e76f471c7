//! Checks every object before a mount, with the kernel's fs-verity: `check=all` and `check=content`.

use super::fixtures::{self, Fixture, V1, V2};
use super::machines::CONTENTS;
use super::mounted::{self, Traces, with_verity};
use super::probe;
use super::verity::can_verify;
use crate::Error;
use crate::scenario::{Guest, Scenario};
use sealmount::{
    CheckReport, Error as MountError, Image, MountOptions, ObjectCheck, ObjectProblem,
    ObjectVerity, Verity, VerityUnavailable,
};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "check_all_reports_bad_objects",
        machine: &CONTENTS,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| check(guest, ObjectCheck::All),
    },
    Scenario {
        name: "check_content_reports_bad_objects",
        machine: &CONTENTS,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| check(guest, ObjectCheck::Content),
    },
];

fn check(guest: &mut Guest, kind: ObjectCheck) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    for fixture in [&V1, &V2] {
        if can_verify(fixture, &disk)? {
            let place = disk.join(kind.to_string());
            fixture.copy_with_verity(&disk, &place)?;
            right_digests_pass(fixture, &place, kind)?;
            other_digest_fails(fixture, &place, kind)?;
            missing_verity_fails_or_is_reported(fixture, &place, kind)?;
        }
    }
    Ok(())
}

fn options(fixture: &Fixture, place: &Path, kind: ObjectCheck, verity: Verity) -> MountOptions {
    let mut options = with_verity(&MountOptions::new(fixture.objects_in(place)), verity);
    options.overlay.check = Some(kind);
    options
}

/// Checks the objects, without a mount of an overlay.
fn report(
    fixture: &Fixture,
    place: &Path,
    kind: ObjectCheck,
    verity: Verity,
) -> Result<CheckReport, MountError> {
    let erofs = Image::open(fixture.image_in(place))?.trust()?.mount()?;
    let overlay = options(fixture, place, kind, verity).overlay.open()?;
    Ok(overlay.check_objects(&erofs, kind, &mut |_| ControlFlow::Continue(()))?)
}

/// Returns the problem of the only object that fails the check.
fn problem(error: Option<MountError>) -> ObjectProblem {
    let report = error.as_ref().and_then(MountError::check_report);
    let report = report.unwrap_or_else(|| panic!("no report: {error:?}"));
    assert_eq!(report.failed, 1, "{report:?}");
    report.failures[0].problem.clone()
}

fn right_digests_pass(fixture: &Fixture, place: &Path, kind: ObjectCheck) -> Result<(), Error> {
    for verity in [Verity::Require, Verity::Try, Verity::Off] {
        // The kernel releases a loop device shortly after its last use.
        let before = Traces::now()?;
        let report = report(fixture, place, kind, verity)?;
        assert_eq!((report.objects, report.failed, report.unverified), (18, 0, None));
        if verity == Verity::Require && !probe::overlayfs()?.verity {
            before.assert_same_now()?;
            continue;
        }
        let options = options(fixture, place, kind, verity);
        let mounted = mounted::mount(&options, &fixture.image_in(place))??;
        let is_enforced = mounted.verity == Some(ObjectVerity::Enforced);
        assert_eq!(is_enforced, verity != Verity::Off && probe::overlayfs()?.verity);
        mounted.assert_shows(fixture);
        mounted.unmount()?;
        before.assert_same_now()?;
    }
    Ok(())
}

/// Returns the last object, which sealmount does not sample.
fn last_object(fixture: &Fixture, place: &Path) -> Result<PathBuf, Error> {
    let mut objects = fixtures::objects(&fixture.objects_in(place))?;
    Ok(objects.pop().ok_or("no objects")?)
}

fn replace(object: &Path, content: &[u8]) -> Result<(), Error> {
    fs::remove_file(object)?;
    Ok(fs::write(object, content)?)
}

fn other_digest_fails(fixture: &Fixture, place: &Path, kind: ObjectCheck) -> Result<(), Error> {
    let object = last_object(fixture, place)?;
    let content = fs::read(&object)?;
    let mut other = content.clone();
    other[0] ^= 1;
    replace(&object, &other)?;
    let algorithm = fixture.digest()?.algorithm();
    fixtures::enable_verity(&object, algorithm)?;
    for verity in [Verity::Require, Verity::Try] {
        let before = Traces::now()?;
        let problem = problem(report(fixture, place, kind, verity).err());
        assert!(matches!(problem, ObjectProblem::WrongVerityDigest { .. }), "{problem:?}");
        let options = options(fixture, place, kind, verity);
        let error = mounted::mount(&options, &fixture.image_in(place))?.err();
        assert!(error.is_some_and(|error| error.check_report().is_some()));
        before.assert_same_now()?;
    }
    // Without verity, only the content shows the change.
    match (kind, report(fixture, place, kind, Verity::Off)) {
        (ObjectCheck::All, result) => drop(result?),
        (_, result) => {
            let problem = problem(result.err());
            assert!(matches!(problem, ObjectProblem::WrongContent { .. }), "{problem:?}");
        }
    }
    replace(&object, &content)?;
    Ok(fixtures::enable_verity(&object, algorithm)?)
}

fn missing_verity_fails_or_is_reported(
    fixture: &Fixture,
    place: &Path,
    kind: ObjectCheck,
) -> Result<(), Error> {
    let object = last_object(fixture, place)?;
    replace(&object, &fs::read(&object)?)?;
    let problem = problem(report(fixture, place, kind, Verity::Require).err());
    let not_enabled = VerityUnavailable::NotEnabled;
    let is_expected =
        matches!(problem, ObjectProblem::VerityUnavailable(reason) if reason == not_enabled);
    assert!(is_expected, "{problem:?}");

    assert_eq!(report(fixture, place, kind, Verity::Try)?.unverified, Some(not_enabled));
    let options = options(fixture, place, kind, Verity::Try);
    let mounted = mounted::mount(&options, &fixture.image_in(place))??;
    assert_eq!(mounted.verity, Some(ObjectVerity::UnsupportedByObjects(not_enabled)));
    mounted.assert_shows(fixture);
    mounted.unmount()?;
    report(fixture, place, kind, Verity::Off)?;
    Ok(())
}
