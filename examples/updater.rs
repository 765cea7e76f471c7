//! Checks an image and its object directories before an update is installed. Reports the verified parts and
//! their verifier. Sorts each error by the reaction that it needs.
//!
//! ```sh
//! cargo run --release --example updater                             # with the bundled image
//! cargo run --release --example updater -- IMAGE DIGEST OBJECTS...
//! ```
//!
//! The example attaches no mount. As root, it also checks every object that the image refers to.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use sealmount::{
    CopyOptions, Digest, Error, ErrorKind, Image, Location, MemoryKind, ObjectCheck,
    OverlayOptions, Progress, Source, SourceReport, Verity, VerityStatus,
};

const DIGEST: &str = "9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    if let Some(image) = arguments.next() {
        let digest = arguments.next().ok_or("usage: updater IMAGE DIGEST OBJECTS...")?;
        let digest = digest.to_str().ok_or("the digest is not text")?.parse()?;
        let update =
            Update { image: image.into(), digest, objects: arguments.map(Into::into).collect() };
        return Ok(report(check(&update, &mut |_| ControlFlow::Continue(())))?);
    }

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bundled = root.join("tests/images/v1");
    let good = Update {
        image: bundled.join("image.cfs"),
        digest: DIGEST.parse()?,
        objects: vec![bundled.join("objects")],
    };
    println!("-- The bundled image");
    let mut progress = |Progress { done, total, .. }| {
        println!("  {done} of {total} bytes");
        ControlFlow::Continue(())
    };
    report(check(&good, &mut progress))?;

    let wrong_digest = Update { digest: Digest::Sha256([0; 32]), ..good.clone() };
    let not_an_image = Update { image: root.join("Cargo.toml"), ..good.clone() };
    let no_objects = Update { objects: vec![bundled.join("missing")], ..good.clone() };
    let other_objects =
        Update { objects: vec![root.join("tests/images/v2-sha512/objects")], ..good.clone() };
    for (title, update) in [
        ("Another digest", &wrong_digest),
        ("A file that is not an image", &not_an_image),
        ("A missing object directory", &no_objects),
        ("Objects of another image", &other_objects),
    ] {
        println!("-- {title}");
        // The errors are the purpose of these checks.
        let _ = report(check(update, &mut |_| ControlFlow::Continue(())));
    }

    println!("-- Stopped by the user");
    let _ = report(check(&good, &mut |_| ControlFlow::Break(())));
    Ok(())
}

/// An update that was downloaded.
#[derive(Clone)]
struct Update {
    image: PathBuf,
    digest: Digest,
    objects: Vec<PathBuf>,
}

/// Checks an update. `progress` is called during long work, and can stop it.
fn check(
    update: &Update,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<SourceReport, Error> {
    let image = Image::open(&update.image)?;
    println!("image: {}", image.path().display());
    match (image.header(), image.compression()) {
        (Some(header), _) => println!(
            "  {}, {} bytes, blocks of {} bytes",
            header.format(),
            header.size(),
            header.block_size()
        ),
        (None, Some(compression)) => println!("  {compression}, {} bytes", image.file_size()),
        (None, None) => {}
    }

    let kernel_verifies = match image.verity()? {
        VerityStatus::Digest(found) => {
            println!("  fs-verity: {found}");
            found == update.digest
        }
        VerityStatus::NotEnabled => {
            println!("  fs-verity: not enabled on the file");
            false
        }
        _ => {
            println!("  fs-verity: not supported for this file");
            false
        }
    };
    println!("  verified by: {}", if kernel_verifies { "the kernel" } else { "sealmount" });

    let mut overlay = OverlayOptions::default();
    overlay.objects = update.objects.iter().map(Location::from).collect();
    overlay.verity = Some(Verity::Require);
    match overlay.open() {
        Ok(_) => println!("objects: have fs-verity, overlayfs verifies each object"),
        Err(error) if error.kind() == ErrorKind::VerityUnavailable => {
            println!("objects: cannot be verified on this system");
            println!("  {error}");
        }
        Err(error) => return Err(error.into()),
    }

    let source = if kernel_verifies {
        image.verify(update.digest)?
    } else {
        // The copy is hashed while it is made. Its memory is freed at the end of this function.
        let mut options = CopyOptions::new(MemoryKind::Memfd);
        options.digest = Some(update.digest);
        image.copy_with_progress(&options, progress)?
    };
    check_objects(&source, overlay)?;
    Ok(source.report().clone())
}

/// Reads every object and compares it with the image, whether or not the kernel can verify objects.
fn check_objects(source: &Source, mut overlay: OverlayOptions) -> Result<(), Error> {
    overlay.verity = Some(Verity::Try);
    let erofs = match source.mount() {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            println!("objects: not checked (a check needs root)");
            return Ok(());
        }
        erofs => erofs?,
    };
    let mut progress = |_| ControlFlow::Continue(());
    let report = overlay.open()?.check_objects(&erofs, ObjectCheck::Content, &mut progress)?;
    println!("objects: {report}");
    Ok(())
}

/// The reaction to an error.
#[derive(Debug)]
enum Reaction {
    /// The same check may succeed later.
    TryAgain,
    /// The update is damaged. Another download may help.
    Broken,
    /// A person must change the system or the configuration.
    Operator,
}

impl Reaction {
    fn to(error: &Error) -> Reaction {
        match error.kind() {
            ErrorKind::OutOfMemory | ErrorKind::Busy | ErrorKind::Cancelled => Reaction::TryAgain,
            ErrorKind::NotAnImage | ErrorKind::DigestMismatch | ErrorKind::ObjectsDamaged => {
                Reaction::Broken
            }
            // ErrorKind may get more kinds: a person can handle all of them.
            _ => Reaction::Operator,
        }
    }
}

/// Prints the result of a check.
fn report(result: Result<SourceReport, Error>) -> Result<(), Error> {
    match result {
        Ok(report) => {
            let by = match report.verified {
                Some(verified) => format!("verified, {}", verified.by),
                None => "not verified".into(),
            };
            println!("{by}: {} bytes", report.size);
            Ok(())
        }
        Err(error) => {
            println!("{:?}: {error}", Reaction::to(&error));
            for failure in error.check_report().iter().flat_map(|report| &report.failures) {
                println!("  {failure}");
            }
            if let Some(hint) = error.hint() {
                println!("  hint: {hint}");
            }
            Err(error)
        }
    }
}
