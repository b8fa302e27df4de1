//! The texts that say who a peer is, parsed without touching the system.
//!
//! Three files of procfs (`fdinfo` of a pidfd, `cgroup`, `uid_map`, and our own `status`) and two names that the kubelet gives
//! (a pod's cgroup and its log folder). Nothing here does I/O, so all of it can be tested and fuzzed with any bytes.
//!
//! Part of what is parsed is chosen by the peer: whoever may make cgroups below their own may give them any name, so a rule here
//! must hold for a path that was built to deceive.

use std::fmt;

/// The `Pid:` of a pidfd's `fdinfo`: positive, 0 for a process that this procfs cannot see, -1 for one that is gone.
pub(crate) fn pidfd_pid(fdinfo: &str) -> Option<i64> {
    only(fdinfo.lines().filter_map(|line| line.strip_prefix("Pid:")))?
        .trim_matches([' ', '\t'])
        .parse()
        .ok()
}

/// The innermost of the process ids that `status` lists: the one the process itself knows as its own.
pub(crate) fn innermost_pid(status: &str) -> Option<u32> {
    only(
        status
            .lines()
            .filter_map(|line| line.strip_prefix("NSpid:")),
    )?
    .split_ascii_whitespace()
    .next_back()?
    .parse()
    .ok()
}

/// Whether a `uid_map` maps every user to itself, so that a uid we are shown is the uid that the host means.
pub(crate) fn is_identity_uid_map(uid_map: &str) -> bool {
    only(uid_map.lines())
        .is_some_and(|line| line.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
}

/// The path of the unified hierarchy, from the one `0::` line of a `cgroup` file.
///
/// The lines of the older hierarchies are not asked: on a hybrid node a container may be given one of them to write to.
pub(crate) fn unified_cgroup(cgroup: &str) -> Option<&str> {
    only(cgroup.lines().filter_map(|line| line.strip_prefix("0::")))
        .filter(|path| path.starts_with('/'))
}

/// Whether a cgroup path leaves the cgroup namespace of its reader, and so does not begin where it seems to.
pub(crate) fn is_outside_our_cgroup_namespace(cgroup: &str) -> bool {
    cgroup.split('/').any(|component| component == "..")
}

/// The UID of a static pod: 32 hexadecimal digits, the hash the kubelet makes of the pod's manifest.
///
/// Every other pod is given its UID by the API server, with dashes, so an ordinary pod can never have one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StaticPodUid(String);

impl StaticPodUid {
    fn parse(text: &str) -> Option<Self> {
        (text.len() == 32
            && text
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
        .then(|| Self(text.to_owned()))
    }

    /// The 32 digits.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `folder` is the name of the log folder that the kubelet makes for a kube-apiserver with this UID:
    /// `kube-system_kube-apiserver-<node>_<uid>`.
    pub(crate) fn names_log_folder_of_kube_apiserver(&self, folder: &str) -> bool {
        folder
            .strip_prefix("kube-system_kube-apiserver-")
            .and_then(|rest| rest.strip_suffix(self.as_str()))
            .and_then(|rest| rest.strip_suffix('_'))
            .is_some_and(|node| {
                !node.is_empty()
                    && node
                        .bytes()
                        .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
            })
    }
}

impl fmt::Display for StaticPodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a cgroup is not that of a static pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAStaticPod {
    /// No `kubepods` on the way.
    #[error("it is in no pod")]
    NoPod,
    /// `kubepods` lies below a unit whose owner may have made it.
    #[error("its pods lie inside a systemd unit, which may have made their names")]
    InsideUnit,
    /// Something else than a QoS class or a pod comes after `kubepods`.
    #[error("it is not laid out as the kubelet does")]
    Layout,
    /// A pod that the API server named.
    #[error("its pod is not a static one")]
    OrdinaryPod,
}

/// The static pod a cgroup belongs to.
///
/// `…/kubepods[/burstable|/besteffort]/pod<uid>/…` with the kubelet's cgroupfs driver,
/// `…/kubepods.slice[/kubepods-burstable.slice]/kubepods-burstable-pod<uid>.slice/…` with systemd's.
///
/// Only the first `kubepods` counts and only the first pod in it: a container that may write to its own cgroup can go on
/// below with any names it likes. For the same reason nothing counts below a `.service` or `.scope`: those are what systemd
/// hands over to unprivileged users and services, and the kubelet's tree is never inside one.
pub(crate) fn static_pod(cgroup: &str) -> Result<StaticPodUid, NotAStaticPod> {
    let mut components = cgroup.split('/').filter(|component| !component.is_empty());
    let systemd = loop {
        match components.next().ok_or(NotAStaticPod::NoPod)? {
            "kubepods" => break false,
            "kubepods.slice" => break true,
            unit if unit.ends_with(".service") || unit.ends_with(".scope") => {
                return Err(NotAStaticPod::InsideUnit);
            }
            _ => {}
        }
    };
    let first = components.next().ok_or(NotAStaticPod::NoPod)?;
    let (pod, prefix) = match (systemd, first) {
        (false, "burstable" | "besteffort") => {
            (components.next().ok_or(NotAStaticPod::NoPod)?, "pod")
        }
        (false, _) => (first, "pod"),
        (true, "kubepods-burstable.slice") => (
            components.next().ok_or(NotAStaticPod::NoPod)?,
            "kubepods-burstable-pod",
        ),
        (true, "kubepods-besteffort.slice") => (
            components.next().ok_or(NotAStaticPod::NoPod)?,
            "kubepods-besteffort-pod",
        ),
        (true, _) => (first, "kubepods-pod"),
    };
    let uid = pod.strip_prefix(prefix).ok_or(NotAStaticPod::Layout)?;
    let uid = if systemd {
        uid.strip_suffix(".slice").ok_or(NotAStaticPod::Layout)?
    } else {
        uid
    };
    StaticPodUid::parse(uid).ok_or(NotAStaticPod::OrdinaryPod)
}

/// The only item, or none if there are several: a file that says a thing twice is not believed.
fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next()?;
    items.next().is_none().then_some(first)
}
