//! The texts that say who a peer is, parsed without touching the system.
//!
//! Three files of procfs (`fdinfo` of a pidfd, `cgroup`, `uid_map`, and our own `status`) and two
//! names that the kubelet gives (a pod's cgroup and its log folder). Nothing here does I/O, so all
//! of it can be tested and fuzzed with any bytes.
//!
//! Part of what is parsed is chosen by the peer: whoever may make cgroups below their own may give
//! them any name, so a rule here must hold for a path that was built to deceive.

use std::fmt;

/// The `Pid:` of a pidfd's `fdinfo`: positive, 0 for a process that this procfs cannot see, -1 for
/// one that is gone.
pub(crate) fn pidfd_pid(fdinfo: &str) -> Option<i64> {
    only(fdinfo.lines().filter_map(|line| line.strip_prefix("Pid:")))?
        .trim_matches([' ', '\t'])
        .parse()
        .ok()
}

/// The innermost of the process ids that `status` lists: the one the process itself knows as its
/// own.
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

/// Whether a `uid_map` maps every user to itself, so that a uid we are shown is the uid that the
/// host means.
pub(crate) fn is_identity_uid_map(uid_map: &str) -> bool {
    only(uid_map.lines())
        .is_some_and(|line| line.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
}

/// The path of the unified hierarchy, from the one `0::` line of a `cgroup` file.
///
/// The lines of the older hierarchies are not asked: on a hybrid node a container may be given one
/// of them to write to.
pub(crate) fn unified_cgroup(cgroup: &str) -> Option<&str> {
    only(cgroup.lines().filter_map(|line| line.strip_prefix("0::")))
        .filter(|path| path.starts_with('/'))
}

/// Whether a cgroup path leaves the cgroup namespace of its reader, and so does not begin where it
/// seems to.
pub(crate) fn is_outside_our_cgroup_namespace(cgroup: &str) -> bool {
    cgroup.split('/').any(|component| component == "..")
}

/// The UID of a static pod: 32 hexadecimal digits, the hash the kubelet makes of the pod's
/// manifest.
///
/// Every other pod is given its UID by the API server, with dashes, so an ordinary pod can never
/// have one of these.
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

    /// Whether `folder` is the name of the log folder that the kubelet makes for a kube-apiserver
    /// with this UID: `kube-system_kube-apiserver-<node>_<uid>`.
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
/// `…/kubepods.slice[/kubepods-burstable.slice]/kubepods-burstable-pod<uid>.slice/…` with
/// systemd's.
///
/// Only the first `kubepods` counts and only the first pod in it: a container that may write to its
/// own cgroup can go on below with any names it likes. For the same reason nothing counts below a
/// `.service` or `.scope`: those are what systemd hands over to unprivileged users and services,
/// and the kubelet's tree is never inside one.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "c3b1fa1f2d6d4f4f8d3a5b6c7d8e9f00";
    const OTHER: &str = "00000000000000000000000000000000";
    const ORDINARY: &str = "1f2e3d4c-5b6a-4798-8899-aabbccddeeff";

    fn pod(cgroup: &str) -> Result<String, NotAStaticPod> {
        static_pod(cgroup).map(|uid| uid.to_string())
    }

    #[test]
    fn both_drivers_of_the_kubelet_and_all_classes_of_service_are_understood() {
        for cgroup in [
            format!("/kubepods/pod{UID}/ctr"),
            format!("/kubepods/burstable/pod{UID}/ctr"),
            format!("/kubepods/besteffort/pod{UID}"),
            format!("/kubelet/kubepods/burstable/pod{UID}/ctr"),
            format!("/kubepods.slice/kubepods-pod{UID}.slice/cri-containerd-1.scope"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID}.slice/x.scope"
            ),
            format!("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID}.slice"),
        ] {
            assert_eq!(pod(&cgroup).as_deref(), Ok(UID), "{cgroup}");
        }
    }

    #[test]
    fn a_pod_that_the_api_server_named_is_not_static() {
        let underscores = ORDINARY.replace('-', "_");
        for cgroup in [
            format!("/kubepods/burstable/pod{ORDINARY}/ctr"),
            format!("/kubepods.slice/kubepods-pod{underscores}.slice/ctr"),
            format!("/kubepods/pod{}/ctr", UID.to_uppercase()),
            format!("/kubepods/pod{}/ctr", &UID[1..]),
            format!("/kubepods/pod{UID}0/ctr"),
            format!("/kubepods/pod{UID} (deleted)"),
            "/kubepods/pod/ctr".into(),
        ] {
            assert_eq!(pod(&cgroup), Err(NotAStaticPod::OrdinaryPod), "{cgroup}");
        }
    }

    #[test]
    fn the_drivers_are_not_mixed() {
        for cgroup in [
            format!("/kubepods/kubepods-pod{UID}.slice"),
            format!("/kubepods/burstable/kubepods-burstable-pod{UID}.slice"),
            format!("/kubepods.slice/pod{UID}"),
            format!("/kubepods.slice/kubepods-pod{UID}"),
            format!("/kubepods.slice/kubepods-burstable-pod{UID}.slice"),
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod{UID}.slice"),
            format!("/kubepods/other/pod{UID}"),
            format!("/kubepods/kubepods/pod{UID}"),
        ] {
            assert_eq!(pod(&cgroup), Err(NotAStaticPod::Layout), "{cgroup}");
        }
    }

    #[test]
    fn what_is_in_no_pod_is_not_in_one_that_its_name_resembles() {
        for cgroup in [
            "/".to_owned(),
            String::new(),
            "/system.slice/x.slice".into(),
            "/kubepods".into(),
            "/kubepods/burstable".into(),
            format!("/pod{UID}/ctr"),
            format!("/xkubepods/pod{UID}/ctr"),
            format!("/kubepods-x/pod{UID}"),
            format!("/Kubepods/pod{UID}"),
        ] {
            assert_eq!(pod(&cgroup), Err(NotAStaticPod::NoPod), "{cgroup}");
        }
    }

    #[test]
    fn pods_below_a_unit_that_may_have_made_them_do_not_count() {
        for unit in ["user@1000.service", "session-1.scope"] {
            let cgroup =
                format!("/user.slice/user-1000.slice/{unit}/kubepods/burstable/pod{UID}/ctr");
            assert_eq!(pod(&cgroup), Err(NotAStaticPod::InsideUnit), "{cgroup}");
        }
    }

    #[test]
    fn the_first_pod_counts_and_not_one_made_inside_of_it() {
        let nested = format!("/kubepods/burstable/pod{UID}/ctr/kubepods/burstable/pod{OTHER}/ctr");
        assert_eq!(pod(&nested).as_deref(), Ok(UID));
        let ordinary =
            format!("/kubepods/burstable/pod{ORDINARY}/ctr/kubepods/burstable/pod{UID}/ctr");
        assert_eq!(pod(&ordinary), Err(NotAStaticPod::OrdinaryPod));
        let in_class = format!("/kubepods/burstable/pod{ORDINARY}/pod{UID}");
        assert_eq!(pod(&in_class), Err(NotAStaticPod::OrdinaryPod));
    }

    #[test]
    fn a_log_folder_is_that_of_a_kube_apiserver_of_this_uid_on_some_node() {
        let uid = StaticPodUid::parse(UID).unwrap();
        for name in [
            format!("kube-system_kube-apiserver-cp-1.example_{UID}"),
            format!("kube-system_kube-apiserver-n_{UID}"),
        ] {
            assert!(uid.names_log_folder_of_kube_apiserver(&name), "{name}");
        }
        for name in [
            format!("kube-system_kube-apiserver-cp-1_{OTHER}"),
            format!("kube-system_kube-apiserver_{UID}"),
            format!("kube-system_kube-apiserver-_{UID}"),
            format!("kube-system_kube-apiserver-a_b_{UID}"),
            format!("kube-system_kube-apiserver-a/b_{UID}"),
            format!("kube-system_kube-scheduler-cp-1_{UID}"),
            format!("default_kube-apiserver-cp-1_{UID}"),
            format!("kube-system_kube-apiserver-cp-1_{UID}.old"),
            format!("kube-system_kube-apiserver-cp-1{UID}"),
            String::new(),
        ] {
            assert!(!uid.names_log_folder_of_kube_apiserver(&name), "{name}");
        }
    }

    #[test]
    fn the_pid_of_a_pidfd_is_read_as_the_kernel_writes_it() {
        let fdinfo = |pid: &str| {
            format!(
                "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t2\nPid:\t{pid}\nNSpid:\t{pid}\t7\n"
            )
        };
        assert_eq!(pidfd_pid(&fdinfo("4711")), Some(4711));
        assert_eq!(pidfd_pid(&fdinfo("0")), Some(0));
        assert_eq!(pidfd_pid(&fdinfo("-1")), Some(-1));
        for wrong in ["", "x", "1 2", "99999999999999999999"] {
            assert_eq!(pidfd_pid(&fdinfo(wrong)), None, "{wrong}");
        }
        assert_eq!(pidfd_pid("pos:\t0\n"), None);
        assert_eq!(pidfd_pid("Pid:\t1\nPid:\t2\n"), None);
    }

    #[test]
    fn the_innermost_pid_is_the_last() {
        assert_eq!(
            innermost_pid("Name:\thsmd\nNSpid:\t285\t1\nNStgid:\t285\t1\n"),
            Some(1)
        );
        assert_eq!(innermost_pid("NSpid:\t285\n"), Some(285));
        assert_eq!(innermost_pid("Name:\thsmd\n"), None);
        assert_eq!(innermost_pid("NSpid:\t\n"), None);
    }

    #[test]
    fn only_the_map_of_everybody_to_themselves_is_the_identity() {
        assert!(is_identity_uid_map("         0          0 4294967295\n"));
        for map in [
            "",
            "         0       1000          1\n",
            "         0          0      65536\n",
            "         0     100000 4294967295\n",
            "         0          0 4294967295\n         1          1          1\n",
            "         0          0 4294967295 0\n",
        ] {
            assert!(!is_identity_uid_map(map), "{map:?}");
        }
    }

    #[test]
    fn only_the_line_of_the_unified_hierarchy_is_believed() {
        let hybrid = format!(
            "12:cpu,cpuacct:/kubepods/pod{OTHER}\n1:name=systemd:/x\n0::/kubepods/pod{UID}/a:b\n"
        );
        assert_eq!(
            unified_cgroup(&hybrid),
            Some(format!("/kubepods/pod{UID}/a:b").as_str())
        );
        assert_eq!(unified_cgroup("1:name=systemd:/x\n"), None);
        assert_eq!(unified_cgroup("0::/a\n0::/b\n"), None);
        assert_eq!(unified_cgroup("10::/a\n"), None);
        assert_eq!(unified_cgroup("0::\n"), None);
    }

    #[test]
    fn a_path_with_two_dots_begins_elsewhere() {
        assert!(is_outside_our_cgroup_namespace("/../kubepods/pod0/ctr"));
        assert!(is_outside_our_cgroup_namespace("/.."));
        assert!(!is_outside_our_cgroup_namespace("/kubepods/pod0/..ctr"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_fail(text in any::<String>()) {
            let _ = (pidfd_pid(&text), innermost_pid(&text), is_identity_uid_map(&text), unified_cgroup(&text));
            let _ = static_pod(&text);
        }

        #[test]
        fn nothing_that_follows_the_pod_changes_which_pod_it_is(suffix in "(/[a-z0-9.:_-]{0,12}|/kubepods|/pod[0-9a-f]{32}){0,6}") {
            let cgroup = format!("/kubepods/burstable/pod{UID}{suffix}");
            prop_assume!(suffix.is_empty() || suffix.starts_with('/'));
            prop_assert_eq!(pod(&cgroup), Ok(UID.to_owned()));
            let ordinary = format!("/kubepods/burstable/pod{ORDINARY}{suffix}");
            prop_assert_eq!(pod(&ordinary), Err(NotAStaticPod::OrdinaryPod));
        }

        #[test]
        fn a_static_pod_is_one_component_of_its_cgroup(components in prop::collection::vec(
            prop_oneof![
                Just("kubepods".to_owned()), Just("kubepods.slice".to_owned()), Just("burstable".to_owned()),
                Just("kubepods-burstable.slice".to_owned()), Just("a.service".to_owned()), Just(String::new()),
                "pod[0-9a-f]{32}", "pod[0-9a-f]{31,33}", "kubepods-burstable-pod[0-9a-f]{32}\\.slice", "[ -~&&[^/]]{0,8}",
            ], 0..8)) {
            let cgroup = format!("/{}", components.join("/"));
            if let Ok(uid) = static_pod(&cgroup) {
                let mut parts = components.iter().filter(|part| !part.is_empty());
                let kubepods = |part: &&String| matches!(part.as_str(), "kubepods" | "kubepods.slice");
                prop_assert!(parts.by_ref().take_while(|part| !kubepods(part)).all(|part| !part.ends_with(".service")));
                let class = |part: &&String| matches!(part.as_str(), "burstable" | "kubepods-burstable.slice");
                let pod = parts.find(|part| !class(part));
                prop_assert!(pod.is_some_and(|pod| pod.contains(uid.as_str())), "{} gave {}", cgroup, uid);
            }
        }
    }
}
