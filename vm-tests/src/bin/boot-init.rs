//! The init of an initramfs that goes on in a composefs root.
#![forbid(unsafe_code)]

fn main() {
    vm_tests::guest::boot_init();
}
