//! What the time of a copy mount is spent on: the steps that the library tells.

use std::time::Instant;

use sealmount::{Memory, MountOptions, Rung, Step, Verity};
use test_support::V1;

use crate::bench::{Bench, Taken};
use crate::images::Image;
use crate::report::{Report, Table};
use crate::timing::{Samples, milliseconds};

const PARTS: [&str; 7] =
    ["open, check", "copy, digest, seal", "loop device", "EROFS", "overlayfs", "attach", "all"];

pub fn measure(bench: &Bench, image: &Image, report: &mut Report) {
    println!("the parts of a mount…");
    let variants = [
        ("plain", None, false),
        ("memfd", Some(Memory::Memfd), false),
        ("memfd, digest", Some(Memory::Memfd), true),
        ("ramfs", Some(Memory::Ramfs), false),
        ("ramfs, digest", Some(Memory::Ramfs), true),
    ];
    let mut samples = variants.map(|_| PARTS.map(|part| (part, Vec::new())));
    bench.effort.rounds(|counts| {
        for ((_, copy, digest), samples) in variants.iter().zip(&mut samples) {
            let mut options = MountOptions::new(V1.objects());
            options.copy = *copy;
            options.digest = digest.then_some(image.digest);
            options.verity = Some(Verity::Off);
            let memory = copy.map(|kind| match kind {
                Memory::Ramfs => Taken::Ramfs(image.size),
                _ => Taken::PageCache(image.size),
            });
            let times = bench.with_memory(memory.as_slice(), || mount(bench, &options, image));
            for (time, (_, times)) in times.iter().zip(samples) {
                if counts {
                    times.push(*time);
                }
            }
        }
    });

    let header = variants.iter().map(|(name, ..)| *name);
    let mut table = Table::new("parts", ["ms"].into_iter().chain(header).collect());
    let samples = samples.map(|parts| {
        parts.map(|(name, values)| Samples { name: name.to_owned(), values }).to_vec()
    });
    for (number, part) in PARTS.iter().enumerate() {
        let cells = samples.iter().map(|parts| format!("{:.2}", parts[number].median()));
        table.row([part.to_string()].into_iter().chain(cells));
    }
    for ((name, ..), samples) in variants.iter().zip(samples) {
        report.add(&format!("ms, parts of {name}"), samples);
    }
    report.table(table);
}

/// The time of each part, in milliseconds. A way that this kernel does not have counts for the one
/// that is taken.
fn mount(bench: &Bench, options: &MountOptions, image: &Image) -> [f64; PARTS.len()] {
    let mut times = [0.0; PARTS.len()];
    let start = Instant::now();
    let mut before = start;
    let mut add = |part: usize| {
        let now = Instant::now();
        times[part] += milliseconds(now - before);
        before = now;
    };
    let mount = options
        .mount_with(image.path.as_path(), &mut |step| match step {
            Step::ImageOpened { .. } => add(0),
            Step::DigestVerified { .. } | Step::Copied { .. } => add(1),
            Step::LoopDevice { .. } => add(2),
            Step::Taken {
                rung: Rung::SourceByDescriptor | Rung::SourceByPath | Rung::SourceByLoopDevice,
            } => add(3),
            Step::Taken { .. } => add(4),
            _ => {}
        })
        .unwrap();
    mount.attach(bench.mnt.as_path()).unwrap();
    add(5);
    times[6] = milliseconds(start.elapsed());
    bench.unmount();
    times
}
