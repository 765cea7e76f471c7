//! Takes permissions from the calling thread, and what it starts, for good: as the seccomp filters of
//! containers and the security modules of the kernel do.

use std::collections::BTreeMap;

use landlock::{AccessFs, Ruleset, RulesetAttr, RulesetStatus};
use rustix::io::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// The number of a system call.
pub type SystemCall = i64;

/// These system calls answer with an errno and do nothing.
pub fn refuse(system_calls: &[SystemCall], errno: Errno) {
    filter(system_calls.iter().map(|number| (*number, vec![])).collect(), errno);
}

/// This system call does where an argument has this value; the first argument is 0.
pub fn refuse_argument(system_call: SystemCall, argument: u8, value: u32, errno: Errno) {
    let value = u64::from(value);
    let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    let condition = SeccompCondition::new(argument, length, equal, value).unwrap();
    let rule = SeccompRule::new(vec![condition]).unwrap();
    filter(BTreeMap::from([(system_call, vec![rule])]), errno);
}

fn filter(rules: BTreeMap<SystemCall, Vec<SeccompRule>>, errno: Errno) {
    let answer = SeccompAction::Errno(errno.raw_os_error() as u32);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, architecture).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// Landlock, a security module by which a process can restrict itself. Here nothing but making sockets
/// is refused, and, as to whoever is restricted in any way, every change of mounts.
pub fn restrict_by_landlock() {
    let ruleset = Ruleset::default().handle_access(AccessFs::MakeSock).unwrap().create().unwrap();
    assert_eq!(
        ruleset.restrict_self().unwrap().ruleset,
        RulesetStatus::FullyEnforced,
        "this test takes a kernel with Landlock: CONFIG_SECURITY_LANDLOCK, and in lsm=",
    );
}
