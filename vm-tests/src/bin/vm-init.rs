//! Runs as process 1 of a virtual machine, and as the process of each scenario.
#![forbid(unsafe_code)]

fn main() {
    vm_tests::guest::main();
}
