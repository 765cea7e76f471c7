//! Takes permissions from the calling thread and its children for good, like the seccomp filters of
//! containers and the security modules of the kernel.

use std::collections::BTreeMap;
use std::ffi::c_long;

use landlock::{AccessFs, Ruleset, RulesetAttr, RulesetStatus};
use rustix::io::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// The number of a system call.
pub type SystemCall = c_long;

/// Makes these system calls fail with an errno.
pub fn deny(system_calls: &[SystemCall], errno: Errno) {
    filter(system_calls.iter().map(|number| (*number, vec![])).collect(), errno);
}

/// Makes a system call fail if an argument has this value. The first argument has the number 0.
pub fn deny_argument(system_call: SystemCall, argument: u8, value: u32, errno: Errno) {
    let value = u64::from(value);
    let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    let condition = SeccompCondition::new(argument, length, equal, value).unwrap();
    let rule = SeccompRule::new(vec![condition]).unwrap();
    filter(BTreeMap::from([(system_call, vec![rule])]), errno);
}

fn filter(rules: BTreeMap<SystemCall, Vec<SeccompRule>>, errno: Errno) {
    #[allow(clippy::unnecessary_cast)] // c_long has 32 bits on 32-bit architectures.
    let rules = rules.into_iter().map(|(number, rules)| (number as i64, rules)).collect();
    let answer = SeccompAction::Errno(errno.raw_os_error() as u32);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, architecture).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// Restricts the calling thread with Landlock, a security module that needs no privileges. The ruleset
/// denies only the creation of sockets. Landlock also denies every change of mounts to a restricted
/// process.
pub fn restrict_by_landlock() {
    let ruleset = Ruleset::default().handle_access(AccessFs::MakeSock).unwrap().create().unwrap();
    assert_eq!(
        ruleset.restrict_self().unwrap().ruleset,
        RulesetStatus::FullyEnforced,
        "this test needs a kernel with Landlock: CONFIG_SECURITY_LANDLOCK, and landlock in lsm=",
    );
}
