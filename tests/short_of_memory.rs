//! The helper with less private memory than it asks for: an error, never a signal, whatever it is that
//! does not get any.

use std::process::{Command, Output};

use sealmount::{Algorithm, compute_digest};
use test_support::{V1, large_image, sandbox, through};

/// Below this the process does not come as far as main(): 224 KiB if it is linked statically.
const STARTS_WITH: usize = 448 * 1024;
const STEP: usize = 76 * 1024;

#[test]
fn too_little_memory_is_an_error_at_every_step() {
    let Some(sandbox) = sandbox!() else { return };
    let content = large_image(2 << 20);
    let digest = compute_digest(Algorithm::Sha512, &content);
    let basedir = V1.objects();
    let options = format!("copy,noverity,digest={digest},basedir={}", basedir.display());
    for program in [&["cat"][..], &["zstd", "-3", "-c"], &["xz", "-1", "-c"], &["gzip", "-c"]] {
        let image = sandbox.file("image", &through(program, &content));
        // RLIMIT_DATA: all private writable memory of the process, anonymous or not, the first stack
        // aside.
        let with_memory = |bytes: usize| -> Output {
            Command::new("prlimit")
                .arg(format!("--data={bytes}"))
                .args([env!("CARGO_BIN_EXE_mount-composefs"), "-f", "-o", &options])
                .args([image.as_os_str(), "/".as_ref()])
                .output()
                .unwrap()
        };
        let (mut refused, mut memory) = (0, STARTS_WITH);
        // Until it has all that it can make use of.
        while memory < 5 << 20 {
            let output = with_memory(memory);
            let said = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => {}
                Some(2) => {
                    assert!(
                        said.contains("Cannot allocate memory"),
                        "{program:?} {memory}: {said}"
                    );
                    refused += 1;
                }
                _ => panic!("{program:?} with {memory} bytes: {output:?}"),
            }
            memory += STEP;
        }
        assert!(refused > 0, "{program:?} was refused {refused} times");
        assert!(with_memory(memory).status.success());
    }
}
