//! Runs the helper with too little private memory. Whichever allocation fails, the helper reports an
//! error, and no signal ends the helper.

use std::process::{Command, Output};

use sealmount::{Algorithm, Digest};
use test_support::{V1, large_image, sandbox, through};

/// With less memory, the process does not reach main(). A static program needs 224 KiB.
const STARTS_WITH: usize = 448 * 1024;
const INCREMENT: usize = 76 * 1024;

#[test]
fn too_little_memory_reports_error_at_every_step() {
    let Some(sandbox) = sandbox!() else { return };
    let content = large_image(2 << 20);
    let digest = Digest::of_bytes(Algorithm::Sha512, &content);
    let basedir = V1.objects();
    let options = format!("copy,noverity,digest={digest},basedir={}", basedir.display());
    for program in [&["cat"][..], &["zstd", "-3", "-c"], &["xz", "-1", "-c"], &["gzip", "-c"]] {
        let image = sandbox.file("image", &through(program, &content));
        // RLIMIT_DATA limits all private writable memory of the process, except the first stack.
        let with_memory = |bytes: usize| -> Output {
            Command::new("prlimit")
                .arg(format!("--data={bytes}"))
                .args([env!("CARGO_BIN_EXE_mount-composefs"), "-f", "-o", &options])
                .args([image.as_os_str(), "/".as_ref()])
                .output()
                .unwrap()
        };
        let (mut failed, mut memory) = (0, STARTS_WITH);
        // The last runs have more memory than the helper can use.
        while memory < 5 << 20 {
            let output = with_memory(memory);
            let message = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => {}
                Some(2) => {
                    assert!(
                        message.contains("Cannot allocate memory"),
                        "{program:?} {memory}: {message}"
                    );
                    failed += 1;
                }
                _ => panic!("{program:?} with {memory} bytes: {output:?}"),
            }
            memory += INCREMENT;
        }
        assert!(failed > 0, "{program:?}: no run failed");
        assert!(with_memory(memory).status.success());
    }
}
