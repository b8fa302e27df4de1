//! Who is let in, tried with real processes in real cgroups.
//!
//! Needs root and a cgroup2 mount: a test makes cgroups of its own, puts processes there and gives
//! them another user. The processes are this program again, told by the environment what to be.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

#[path = "peers/node.rs"]
mod node;
#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/peer/mod.rs"]
mod peer;

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use node::{API_SERVER, NOBODY, Node, ORDINARY_POD, OTHER_STATIC_POD, client_at, verdict};
use peer::admit;

#[test]
fn the_kube_apiserver_is_let_in() {
    for cgroup in [
        format!("kubepods/burstable/pod{API_SERVER}/ctr"),
        format!("kubepods/pod{API_SERVER}/ctr"),
        format!(
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{API_SERVER}.slice/cri-containerd-1.scope"
        ),
    ] {
        let node = Node::new();
        for door in [node.abstract_door(), node.path_door()] {
            let client = node.client(NOBODY, &cgroup, &door);
            assert_eq!(
                node.judge(&door),
                Ok(Some(API_SERVER.into())),
                "{cgroup} at {door:?}"
            );
            drop(client);
        }
    }
}

#[test]
fn the_uid_alone_is_enough_for_nobody_whose_cgroup_can_be_seen() {
    let node = Node::new();
    for door in [node.abstract_door(), node.path_door()] {
        for cgroup in [
            "kubelet".to_owned(),
            format!("kubepods/burstable/pod{ORDINARY_POD}/ctr"),
        ] {
            let _node_exporter = node.client(NOBODY, &cgroup, &door);
            assert_eq!(
                node.judge(&door),
                Err("not_kube_apiserver"),
                "{cgroup} at {door:?}"
            );
        }
    }
}

#[test]
fn the_cgroup_alone_is_enough_for_nobody() {
    let node = Node::new();
    for uid in [0, 1000, 65535, 65536] {
        let door = node.abstract_door();
        let _stranger = node.client(
            uid,
            &format!("kubepods/burstable/pod{API_SERVER}/ctr"),
            &door,
        );
        assert_eq!(node.judge(&door), Err("uid"), "{uid}");
    }
}

#[test]
fn another_static_pod_is_not_the_kube_apiserver() {
    let node = Node::new();
    let door = node.abstract_door();
    let _scheduler = node.client(
        NOBODY,
        &format!("kubepods/burstable/pod{OTHER_STATIC_POD}/ctr"),
        &door,
    );
    assert_eq!(node.judge(&door), Err("no_pod_log"));
}

#[test]
fn a_cgroup_made_below_an_ordinary_pod_does_not_deceive() {
    let node = Node::new();
    let door = node.abstract_door();
    let fake =
        format!("kubepods/burstable/pod{ORDINARY_POD}/ctr/kubepods/burstable/pod{API_SERVER}/ctr");
    let _liar = node.client(NOBODY, &fake, &door);
    assert_eq!(node.judge(&door), Err("not_kube_apiserver"));

    let door = node.abstract_door();
    let nested = format!(
        "kubepods/burstable/pod{API_SERVER}/ctr/kubepods/burstable/pod{OTHER_STATIC_POD}/ctr"
    );
    let _api_server = node.client(NOBODY, &nested, &door);
    assert_eq!(node.judge(&door), Ok(Some(API_SERVER.into())));
}

#[test]
fn the_log_folder_is_one_real_folder() {
    let node = Node::new();
    let cgroup = format!("kubepods/burstable/pod{API_SERVER}/ctr");
    let logs = node.rules.pod_logs.clone();
    let folder = logs.join(format!("kube-system_kube-apiserver-cp-1_{API_SERVER}"));
    let judge = || {
        let door = node.abstract_door();
        let _api_server = node.client(NOBODY, &cgroup, &door);
        node.judge(&door)
    };

    let second = logs.join(format!("kube-system_kube-apiserver-cp-2_{API_SERVER}"));
    fs::create_dir(&second).unwrap();
    assert_eq!(judge(), Err("no_pod_log"), "two of them");
    fs::remove_dir(&second).unwrap();

    fs::rename(&folder, logs.join("real")).unwrap();
    symlink("real", &folder).unwrap();
    assert_eq!(judge(), Err("no_pod_log"), "a link");
    fs::remove_file(&folder).unwrap();
    File::create(&folder).unwrap();
    assert_eq!(judge(), Err("no_pod_log"), "a file");
    fs::remove_file(&folder).unwrap();
    assert_eq!(judge(), Err("no_pod_log"), "none");

    fs::rename(logs.join("real"), &folder).unwrap();
    assert_eq!(judge(), Ok(Some(API_SERVER.into())));
}

#[test]
fn who_connected_and_exited_is_not_stood_in_for_by_who_holds_the_connection() {
    let node = Node::new();
    for door in [node.abstract_door(), node.path_door()] {
        let mut client = node.client(
            NOBODY,
            &format!("kubepods/burstable/pod{API_SERVER}/ctr"),
            &door,
        );
        let _heir = client.leave_the_connection_to_another();
        let connection = door.accept();
        // While it is a zombie its id is not free, but it is no kube-apiserver any more.
        while !fs::read_to_string(format!("/proc/{}/stat", client.child.id()))
            .unwrap()
            .contains(") Z ")
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(
            verdict(admit(&connection, door.kind(), &node.rules)),
            Err("exited"),
            "a zombie at {door:?}"
        );
        client.child.wait().unwrap();
        assert_eq!(
            verdict(admit(&connection, door.kind(), &node.rules)),
            Err("exited"),
            "gone at {door:?}"
        );
    }
}

#[test]
fn a_stranger_that_is_65534_only_in_its_own_user_namespace_is_not_65534() {
    let node = Node::new();
    let door = node.abstract_door();
    let mut client = client_at(
        node.command(
            &["unshare", "-U"],
            "client",
            &format!("kubepods/burstable/pod{API_SERVER}/ctr"),
        ),
        &door,
    );
    client.tell("connect");
    assert_eq!(client.hear(), format!("connected as {NOBODY}"));
    assert_eq!(node.judge(&door), Err("uid"));
}

#[test]
fn a_daemon_in_a_user_namespace_takes_no_uid_for_what_it_seems() {
    let node = Node::new();
    // To it a host's uid 1000 looks like 65534.
    let door = node.abstract_door();
    let mut daemon = node.daemon(&["unshare", "-U"], &door, "");
    let _stranger = node.client(1000, "somewhere", &door);
    assert_eq!(daemon.hear(), "refused user_namespace");

    // A file's permissions are checked against the real user, and the cgroup is what it is.
    let door = node.path_door();
    let mut daemon = node.daemon(&["unshare", "-U"], &door, "");
    let _api_server = node.client(NOBODY, &format!("kubepods/pod{API_SERVER}/ctr"), &door);
    assert_eq!(daemon.hear(), format!("admitted {NOBODY} in {API_SERVER}"));
}

#[test]
fn a_daemon_in_a_pid_namespace_needs_the_procfs_of_the_host() {
    let node = Node::new();
    let api_server = format!("kubepods/burstable/pod{API_SERVER}/ctr");
    let own = ["unshare", "-p", "-f", "--kill-child", "--mount-proc"];
    let hosts = ["unshare", "-p", "-f", "--kill-child"];

    for (namespaces, at_abstract, at_path) in [
        (
            &hosts[..],
            format!("admitted {NOBODY} in {API_SERVER}"),
            format!("admitted {NOBODY} in {API_SERVER}"),
        ),
        (
            &own[..],
            "refused pid_hidden".into(),
            format!("admitted {NOBODY} unseen"),
        ),
    ] {
        for (door, expected) in [
            (node.abstract_door(), at_abstract),
            (node.path_door(), at_path),
        ] {
            let mut daemon = node.daemon(namespaces, &door, "");
            let _client = node.client(NOBODY, &api_server, &door);
            assert_eq!(daemon.hear(), expected, "{namespaces:?} at {door:?}");
        }
    }
}

#[test]
fn a_daemon_in_a_pid_namespace_sees_its_peers_in_the_procfs_of_the_host_beside_its_own() {
    let mut node = Node::new();
    let host_proc = node.folder.path().join("host-proc");
    fs::create_dir(&host_proc).unwrap();
    node.rules.host_proc = host_proc.clone();
    let script = r#"mount --rbind /proc "$0" && exec unshare -p -f --kill-child --mount-proc "$@""#;
    let before = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        host_proc.to_str().unwrap(),
    ];
    for (cgroup, expected) in [
        (
            format!("kubepods/burstable/pod{API_SERVER}/ctr"),
            format!("admitted {NOBODY} in {API_SERVER}"),
        ),
        (
            format!("kubepods/burstable/pod{ORDINARY_POD}/ctr"),
            "refused not_kube_apiserver".into(),
        ),
    ] {
        for door in [node.abstract_door(), node.path_door()] {
            let mut daemon = node.daemon(&before, &door, "");
            let _client = node.client(NOBODY, &cgroup, &door);
            assert_eq!(daemon.hear(), expected, "{door:?}");
        }
    }
}

#[test]
fn a_daemon_in_a_cgroup_namespace_does_not_guess_where_a_cgroup_begins() {
    let node = Node::new();
    let api_server = format!("kubepods/burstable/pod{API_SERVER}/ctr");
    for (door, expected) in [
        (node.abstract_door(), "refused cgroup_namespace".to_owned()),
        (node.path_door(), format!("admitted {NOBODY} unseen")),
    ] {
        let mut daemon = node.daemon(&["unshare", "-C"], &door, "");
        let _client = node.client(NOBODY, &api_server, &door);
        assert_eq!(daemon.hear(), expected, "{door:?}");
    }
}

#[test]
fn what_is_not_the_procfs_of_our_own_processes_shows_nobody() {
    let mut node = Node::new();
    let mut elsewhere = Command::new("unshare")
        .args(["-p", "-f", "--mount-proc", "sh", "-c", "echo $$; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(elsewhere.stdout.take().unwrap())
        .read_line(&mut said)
        .unwrap();
    let inner = fs::read_to_string(format!("/proc/{0}/task/{0}/children", elsewhere.id())).unwrap();
    let foreign = PathBuf::from(format!("/proc/{}/root/proc", inner.trim()));
    assert!(
        foreign.join("1/status").exists(),
        "a procfs in which we are not"
    );

    for host_proc in [
        foreign,
        node.folder.path().to_owned(),
        node.folder.path().join("absent"),
        "/dev/null".into(),
    ] {
        node.rules.host_proc = host_proc.clone();
        let cgroup = format!("kubepods/burstable/pod{API_SERVER}/ctr");
        let door = node.abstract_door();
        let _client = node.client(NOBODY, &cgroup, &door);
        assert_eq!(node.judge(&door), Err("no_host_proc"), "{host_proc:?}");
        let door = node.path_door();
        let _client = node.client(NOBODY, &cgroup, &door);
        assert_eq!(node.judge(&door), Ok(None), "{host_proc:?}");
    }
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
}

#[test]
fn a_folder_made_to_look_like_a_procfs_is_not_believed() {
    let mut node = Node::new();
    let forged = node.folder.path().join("proc");
    fs::create_dir(&forged).unwrap();
    symlink("/proc/self", forged.join("self")).unwrap();
    let door = node.abstract_door();
    let client = node.client(NOBODY, "somewhere", &door);
    let process = forged.join(client.child.id().to_string());
    fs::create_dir(&process).unwrap();
    fs::write(
        process.join("cgroup"),
        format!("0::/kubepods/pod{API_SERVER}/ctr\n"),
    )
    .unwrap();
    node.rules.host_proc = forged;
    assert_eq!(node.judge(&door), Err("no_host_proc"));
}

#[test]
fn a_peer_that_leaves_us_few_descriptors_does_not_make_us_blind() {
    let node = Node::new();
    // One is needed for the pidfd, one for the procfs, one for a file in it.
    for left in ["0", "1", "2"] {
        for door in [node.abstract_door(), node.path_door()] {
            let mut daemon = node.daemon(&[], &door, left);
            let _stranger = node.client(NOBODY, "somewhere", &door);
            assert_eq!(daemon.hear(), "refused trouble", "{left} left at {door:?}");
        }
    }
}

#[test]
fn a_refusal_says_what_was_wrong() {
    let node = Node::new();
    let door = node.abstract_door();
    let _client = node.client(
        NOBODY,
        &format!("kubepods/pod{OTHER_STATIC_POD}/ctr"),
        &door,
    );
    let refusal = admit(&door.accept(), door.kind(), &node.rules).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        format!(
            "{} has no folder kube-system_kube-apiserver-<node>_{OTHER_STATIC_POD}",
            node.rules.pod_logs.display()
        )
    );
    let door = node.abstract_door();
    let client = node.client(1000, "somewhere", &door);
    let refusal = admit(&door.accept(), door.kind(), &node.rules).unwrap_err();
    let pid = client.child.id();
    assert_eq!(
        refusal.to_string(),
        format!("its uid 1000 is not in kms.peers.uid (pid {pid})")
    );
    let door = node.abstract_door();
    let _client = node.client(NOBODY, "somewhere", &door);
    let refusal = admit(&door.accept(), door.kind(), &node.rules).unwrap_err();
    let text = refusal.to_string();
    assert!(text.starts_with("its cgroup \"/"), "{text}");
    assert!(
        text.ends_with("/somewhere\" is not that of a static pod"),
        "{text}"
    );
    assert_eq!(refusal.source().unwrap().to_string(), "it is in no pod");
}
