//! Who may speak to the daemon's sockets.
//!
//! A path socket is guarded by its folder and mode, and by the uid the kernel reports. An abstract
//! socket has no permissions and every process of the network namespace may connect, so there the
//! uid is never enough (node-exporter is 65534, too): the peer must be the kube-apiserver's static
//! pod, found by pidfd, cgroup and log folder. Where all of that can be seen, a path socket demands
//! it as well; where it cannot, because the host's procfs is not here or the kernel is older than
//! 6.5, its permissions suffice.
//!
//! The identity is that of whoever called `connect`; a descriptor handed on afterwards carries it
//! along.
//!
//! A refused peer is dropped without a byte and never learns why; the log and the counters do.

mod complaints;
mod parse;
mod process;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use hsm_config::Endpoint;
use nix::sys::socket::{getsockopt, sockopt};

pub(crate) use complaints::Complaints;
pub(crate) use hsm_config::Rules;
pub(crate) use parse::{NotAStaticPod, StaticPodUid};

use process::{HostProc, Process};

/// A node runs at most a few hundred pods; a folder with more entries than this is not the
/// kubelet's.
const POD_LOG_LIMIT: usize = 16 * 1024;

/// Which kind of socket a peer came by: only one of them has permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndpointKind {
    /// A file with owner and mode in a folder with the same.
    Path,
    /// A name that anybody in the network namespace may connect to.
    Abstract,
}

impl EndpointKind {
    /// Which rules the peers of this endpoint meet.
    pub(crate) fn of(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Path { .. } => Self::Path,
            Endpoint::Abstract(_) => Self::Abstract,
        }
    }
}

/// A peer that was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Its user.
    pub(crate) uid: u32,
    /// The UID of its static pod, where it could be seen.
    pub(crate) pod_uid: Option<String>,
}

/// Why a peer was not let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The user is not among those allowed.
    #[error("its uid {uid} is not in kms.peers.uid (pid {pid})")]
    Uid {
        /// The peer's user.
        uid: u32,
        /// Its process at the time, for whoever looks for it; 0 if our pid namespace hides it.
        pid: i32,
    },
    /// We live in a user namespace, where the host's strangers all look like 65534.
    #[error(
        "this daemon runs in a user namespace, where uids of the host cannot be told apart; run it outside of one, or use a path socket"
    )]
    UserNamespace,
    /// The kernel cannot name the peer's process.
    #[error(
        "the kernel has no SO_PEERPIDFD (it came with Linux 6.5), so the peer's process cannot be known; use a path socket"
    )]
    NoPidfd,
    /// The host's procfs is not there.
    #[error("{} does not serve as the host's procfs: {reason}; mount the host's /proc there, or set kms.peers.host_proc", host_proc.display())]
    NoHostProc {
        /// Where it was looked for.
        host_proc: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The peer is in none of the pid namespaces which that procfs shows.
    #[error("its process is not visible in {}; mount the host's /proc there, or set kms.peers.host_proc", host_proc.display())]
    PidHidden {
        /// Where it was looked for.
        host_proc: PathBuf,
    },
    /// Our cgroup namespace hides where the peer's cgroup begins.
    #[error(
        "its cgroup {cgroup:?} lies outside of this daemon's cgroup namespace; run the daemon in the host's"
    )]
    CgroupNamespace {
        /// The path as it is shown to us.
        cgroup: String,
    },
    /// The process that connected is gone; somebody else may hold its connection.
    #[error("the process that connected has exited")]
    Exited,
    /// The peer is something else.
    #[error("its cgroup {cgroup:?} is not that of a static pod")]
    NotKubeApiserver {
        /// The path.
        cgroup: String,
        /// What is wrong with it.
        #[source]
        why: NotAStaticPod,
    },
    /// The peer is a static pod, but not the kube-apiserver's.
    #[error("{} {problem} kube-system_kube-apiserver-<node>_{pod}", pod_logs.display())]
    NoPodLog {
        /// The kubelet's folder.
        pod_logs: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// The peer's pod.
        pod: StaticPodUid,
    },
    /// A system call failed for want of something. Nobody is let in on that account.
    #[error("{doing} failed")]
    Trouble {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Refusal {
    /// A short stable name for counters.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Uid { .. } => "uid",
            Self::UserNamespace => "user_namespace",
            Self::NoPidfd => "no_pidfd",
            Self::NoHostProc { .. } => "no_host_proc",
            Self::PidHidden { .. } => "pid_hidden",
            Self::CgroupNamespace { .. } => "cgroup_namespace",
            Self::Exited => "exited",
            Self::NotKubeApiserver { .. } => "not_kube_apiserver",
            Self::NoPodLog { .. } => "no_pod_log",
            Self::Trouble { .. } => "trouble",
        }
    }

    /// Whether this says that the platform does not show the peer, rather than something about the
    /// peer.
    ///
    /// None of these may be something that a peer can bring about.
    fn is_blindness(&self) -> bool {
        match self {
            Self::NoPidfd
            | Self::NoHostProc { .. }
            | Self::PidHidden { .. }
            | Self::CgroupNamespace { .. } => true,
            Self::Uid { .. }
            | Self::UserNamespace
            | Self::Exited
            | Self::NotKubeApiserver { .. }
            | Self::NoPodLog { .. }
            | Self::Trouble { .. } => false,
        }
    }
}

/// Decides whether the peer of an accepted connection is let in.
pub(crate) fn admit(
    connection: &impl AsFd,
    kind: EndpointKind,
    rules: &Rules,
) -> Result<Peer, Refusal> {
    let credentials =
        getsockopt(connection, sockopt::PeerCredentials).map_err(|errno| Refusal::Trouble {
            doing: "asking for the peer's credentials".into(),
            source: errno.into(),
        })?;
    let uid = credentials.uid();
    if !rules.uids.contains(&uid) {
        return Err(Refusal::Uid {
            uid,
            pid: credentials.pid(),
        });
    }
    match static_pod_of(connection, kind, rules) {
        Ok(pod) => Ok(Peer {
            uid,
            pod_uid: Some(pod.as_str().to_owned()),
        }),
        Err(refusal) if kind == EndpointKind::Path && refusal.is_blindness() => {
            Ok(Peer { uid, pod_uid: None })
        }
        Err(refusal) => Err(refusal),
    }
}

/// The cgroup of the process at the other end, if it can be seen: for an alarm that names who holds
/// a socket.
pub(crate) fn cgroup_of_peer(connection: &impl AsFd, host_proc: &Path) -> Option<String> {
    let process = Process::of_peer(connection).ok()?;
    process.cgroup(&HostProc::open(host_proc).ok()?).ok()
}

fn static_pod_of(
    connection: &impl AsFd,
    kind: EndpointKind,
    rules: &Rules,
) -> Result<StaticPodUid, Refusal> {
    let process = Process::of_peer(connection)?;
    let host_proc = HostProc::open(&rules.host_proc)?;
    // A path socket's file has been checked by the kernel against the peer's real user, whatever
    // number we are shown.
    if kind == EndpointKind::Abstract && !host_proc.has_identity_uid_map()? {
        return Err(Refusal::UserNamespace);
    }
    let cgroup = process.cgroup(&host_proc)?;
    let pod =
        parse::static_pod(&cgroup).map_err(|why| Refusal::NotKubeApiserver { cgroup, why })?;
    has_log_of_kube_apiserver(&rules.pod_logs, pod)
}

/// The kubelet names a pod's log folder by namespace, name and UID, and only root can make one: the
/// only place on the node that ties a static pod's UID to the name kube-apiserver without asking
/// the kube-apiserver.
fn has_log_of_kube_apiserver(pod_logs: &Path, pod: StaticPodUid) -> Result<StaticPodUid, Refusal> {
    let problem = |problem: String| Refusal::NoPodLog {
        pod_logs: pod_logs.to_owned(),
        problem,
        pod: pod.clone(),
    };
    let unreadable = |error: io::Error| problem(format!("cannot be read ({error}) to look for"));
    let mut matching = Vec::new();
    for (count, entry) in fs::read_dir(pod_logs).map_err(unreadable)?.enumerate() {
        let entry = entry.map_err(unreadable)?;
        if count == POD_LOG_LIMIT {
            return Err(problem(format!(
                "has more than {POD_LOG_LIMIT} entries, too many to look for"
            )));
        }
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| pod.names_log_folder_of_kube_apiserver(name))
        {
            // That of the entry itself: a link to a folder is not one.
            matching.push(entry.file_type().map_err(unreadable)?);
        }
    }
    match matching.as_slice() {
        [] => Err(problem("has no folder".into())),
        [kind] if kind.is_dir() => Ok(pod),
        [_] => Err(problem("has something that is not a folder as".into())),
        _ => Err(problem("has more than one".into())),
    }
}
