//! Runs as process 1 of an initramfs and switches to a composefs root.
#![forbid(unsafe_code)]

fn main() {
    vm_tests::guest::boot_init();
}
