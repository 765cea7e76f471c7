//! Process 1 of a virtual machine, and each scenario's process.
#![forbid(unsafe_code)]

fn main() {
    vm_tests::guest::main();
}
