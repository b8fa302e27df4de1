//! Giving up what the module must not have: user, groups, capabilities, and ways to get them back.

use std::io;

use caps::CapSet;
use hsm_wire::fault::Fault;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, getresgid, getresuid, setgroups, setresgid, setresuid};

use super::step;

/// Processes and threads that the module's user may have. Session threads are at most 64, vendor
/// libraries start a few each; a module that forks without end is stopped here.
const MAX_PROCESSES: u64 = 1024;

/// No core dumps, no ptrace, no reading of `/proc/PID/mem` by others of the same user: this process
/// holds the PIN.
pub(crate) fn seal_memory() -> Result<(), Fault> {
    prctl::set_dumpable(false)
        .map_err(|errno| step("prctl", "make itself undumpable")(errno.into()))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
        .map_err(|errno| step("setrlimit", "forbid core dumps")(errno.into()))
}

/// No file that is executed can give privileges.
pub(crate) fn set_no_new_privileges() -> Result<(), Fault> {
    prctl::set_no_new_privs().map_err(|errno| step("prctl", "give up new privileges")(errno.into()))
}

/// Becomes `uid` and `gid`, without groups and capabilities, and checks that it has.
pub(crate) fn drop_all(uid: u32, gid: u32) -> Result<(), Fault> {
    let clear = |set: CapSet| {
        caps::clear(None, set).map_err(|error| {
            step("capset", format!("drop its {set:?} capabilities"))(io::Error::other(error))
        })
    };
    limit_processes().map_err(|errno| step("setrlimit", "limit its processes")(errno.into()))?;
    // The bounding set first: dropping from it takes CAP_SETPCAP.
    clear(CapSet::Bounding)?;
    clear(CapSet::Ambient)?;
    setgroups(&[]).map_err(|errno| step("setgroups", "leave its groups")(errno.into()))?;
    let group = Gid::from_raw(gid);
    setresgid(group, group, group)
        .map_err(|errno| step("setresgid", format!("become group {gid}"))(errno.into()))?;
    let user = Uid::from_raw(uid);
    setresuid(user, user, user)
        .map_err(|errno| step("setresuid", format!("become user {uid}"))(errno.into()))?;
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        clear(set)?;
    }
    set_no_new_privileges()?;
    // The change of the user has reset it to what the system is set to.
    seal_memory()?;
    check(user, group)
}

/// Never more than it was: to raise a hard limit takes CAP_SYS_RESOURCE.
fn limit_processes() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NPROC)?;
    let limit = hard.min(MAX_PROCESSES);
    setrlimit(Resource::RLIMIT_NPROC, limit, limit)
}

/// Asks the kernel, instead of believing that nothing was forgotten above.
fn check(user: Uid, group: Gid) -> Result<(), Fault> {
    let left = |what: &str| {
        step("check", format!("give up its {what}"))(io::Error::other("it still has them"))
    };
    let users = getresuid().map_err(|errno| step("getresuid", "check its user")(errno.into()))?;
    let groups = getresgid().map_err(|errno| step("getresgid", "check its group")(errno.into()))?;
    if [users.real, users.effective, users.saved] != [user; 3]
        || [groups.real, groups.effective, groups.saved] != [group; 3]
    {
        return Err(left("user and group"));
    }
    for set in [
        CapSet::Effective,
        CapSet::Permitted,
        CapSet::Inheritable,
        CapSet::Bounding,
        CapSet::Ambient,
    ] {
        if !caps::read(None, set).is_ok_and(|caps| caps.is_empty()) {
            return Err(left("capabilities"));
        }
    }
    Ok(())
}
