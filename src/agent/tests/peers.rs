//! Who is let in, tried with real processes in real cgroups.
//!
//! Needs root and a cgroup2 mount: a test makes cgroups of its own, puts processes there and gives them another user. The
//! processes are this program again, told by the environment what to be.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/peer/mod.rs"]
mod peer;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, geteuid, setgid, setgroups, setuid};
use tempfile::TempDir;

use peer::{EndpointKind, Peer, Refusal, Rules, admit};

const API_SERVER: &str = "c3b1fa1f2d6d4f4f8d3a5b6c7d8e9f00";
const OTHER_STATIC_POD: &str = "0123456789abcdef0123456789abcdef";
const ORDINARY_POD: &str = "1f2e3d4c-5b6a-4798-8899-aabbccddeeff";
const NOBODY: u32 = 65534;

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
        let heir = client.leave_the_connection_to_another();
        let connection = door.accept();
        // While it is a zombie its id is not free, but it is no kube-apiserver any more.
        while !fs::read_to_string(format!("/proc/{}/stat", client.child.id()))
            .unwrap()
            .contains(") Z ")
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(
            label(admit(&connection, door.kind(), &node.rules)),
            Err("exited"),
            "a zombie at {door:?}"
        );
        client.child.wait().unwrap();
        assert_eq!(
            label(admit(&connection, door.kind(), &node.rules)),
            Err("exited"),
            "gone at {door:?}"
        );
        kill(heir, Signal::SIGKILL).unwrap();
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
    let _client = node.client(1000, "somewhere", &door);
    let refusal = admit(&door.accept(), door.kind(), &node.rules).unwrap_err();
    assert_eq!(refusal.to_string(), "its uid 1000 is not in kms.peers.uid");
}

/// A node's cgroups, pod logs and sockets, for one test.
struct Node {
    cgroups: PathBuf,
    folder: TempDir,
    rules: Rules,
}

impl Node {
    fn new() -> Self {
        assert!(
            geteuid().is_root(),
            "this test gives processes other users and cgroups: run it as root"
        );
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&"cgroup2"))
            .expect("a cgroup2 mount")[1]
            .to_owned();
        let cgroups = Path::new(&root).join(format!(
            "hsmd-peers-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&cgroups).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let pod_logs = folder.path().join("pods");
        for name in [
            format!("kube-system_kube-apiserver-cp-1_{API_SERVER}"),
            format!("kube-system_kube-scheduler-cp-1_{OTHER_STATIC_POD}"),
            format!("kube-system_node-exporter-x_{ORDINARY_POD}"),
        ] {
            fs::create_dir_all(pod_logs.join(name)).unwrap();
        }
        Self {
            cgroups,
            folder,
            rules: Rules {
                pod_logs,
                ..Rules::default()
            },
        }
    }

    fn abstract_door(&self) -> Door {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Door::open(format!(
            "@hsmd-peers-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ))
    }

    fn path_door(&self) -> Door {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = self
            .folder
            .path()
            .join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        let door = Door::open(path.to_str().unwrap().to_owned());
        chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        door
    }

    /// Somebody who has connected.
    fn client(&self, uid: u32, cgroup: &str, door: &Door) -> Actor {
        let client = self.command(&[], "client", cgroup);
        let mut client = client_at(client, door);
        client.tell(&format!("become {uid}"));
        client.tell("connect");
        assert_eq!(client.hear(), format!("connected as {uid}"));
        client
    }

    /// Another process that judges the next peer at this door; with only so many descriptors to spare, if it is said.
    fn daemon(&self, before: &[&str], door: &Door, descriptors: &str) -> Actor {
        let listener = OwnedFd::from(door.listener.try_clone().unwrap());
        Actor::new(
            self.command(before, "daemon", "hsmd")
                .env("HSMD_TEST_DESCRIPTORS", descriptors)
                .stdin(listener),
        )
    }

    /// What becomes of the next peer at a door.
    fn judge(&self, door: &Door) -> Result<Option<String>, &'static str> {
        label(admit(&door.accept(), door.kind(), &self.rules))
    }

    /// This program again, in a cgroup and behind other programs that make namespaces for it.
    fn command(&self, before: &[&str], role: &str, cgroup: &str) -> Command {
        let cgroup = self.cgroups.join(cgroup);
        fs::create_dir_all(&cgroup).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
            .arg(&cgroup)
            .args(before)
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "a_process_plays_the_part_it_is_given",
                "--nocapture",
            ])
            .env("HSMD_TEST_ROLE", role)
            .env("HSMD_TEST_HOST_PROC", &self.rules.host_proc)
            .env("HSMD_TEST_POD_LOGS", &self.rules.pod_logs);
        command
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Processes that were just killed still are in their cgroups for a moment.
        for _ in 0..200 {
            remove_cgroups(&self.cgroups);
            if !self.cgroups.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} could not be removed", self.cgroups.display());
    }
}

fn remove_cgroups(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

fn label(verdict: Result<Peer, Refusal>) -> Result<Option<String>, &'static str> {
    match verdict {
        Ok(peer) => {
            assert_eq!(peer.uid, NOBODY);
            Ok(peer.pod_uid)
        }
        Err(refusal) => Err(refusal.label()),
    }
}

fn client_at(mut command: Command, door: &Door) -> Actor {
    Actor::new(
        command
            .env("HSMD_TEST_DOOR", &door.address)
            .stdin(Stdio::piped()),
    )
}

/// A socket that listens.
#[derive(Debug)]
struct Door {
    /// A path, or a name that begins with `@`.
    address: String,
    listener: UnixListener,
}

impl Door {
    fn open(address: String) -> Self {
        let listener = UnixListener::bind_addr(&socket_address(&address)).unwrap();
        Self { address, listener }
    }

    fn kind(&self) -> EndpointKind {
        if self.address.starts_with('@') {
            EndpointKind::Abstract
        } else {
            EndpointKind::Path
        }
    }

    fn accept(&self) -> UnixStream {
        self.listener.accept().unwrap().0
    }
}

fn socket_address(address: &str) -> SocketAddr {
    match address.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name).unwrap(),
        None => SocketAddr::from_pathname(address).unwrap(),
    }
}

/// Another process of this program. It ends when it is told nothing more, or with the test.
struct Actor {
    child: Child,
    tell: Option<ChildStdin>,
    hear: BufReader<ChildStdout>,
}

impl Actor {
    fn new(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let tell = child.stdin.take();
        let hear = BufReader::new(child.stdout.take().unwrap());
        Self { child, tell, hear }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.tell.as_mut().unwrap(), "{what}").unwrap();
    }

    /// The next thing it says; the test harness in it says things, too.
    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.hear.read_line(&mut line).unwrap(),
                0,
                "the other process has ended"
            );
            if let Some((_, said)) = line.split_once(SAYS) {
                return said.trim_end().to_owned();
            }
        }
    }

    /// Lets it exit while a third process holds its connection.
    fn leave_the_connection_to_another(&mut self) -> Pid {
        self.tell("leave");
        let heir = self.hear().parse().unwrap();
        self.tell = None;
        Pid::from_raw(heir)
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SAYS: &str = "HSMD-TEST-SAYS ";

fn say(what: impl std::fmt::Display) {
    println!("\n{SAYS}{what}");
}

/// Not a test: what this program does when a test has started it again.
#[test]
fn a_process_plays_the_part_it_is_given() {
    match std::env::var("HSMD_TEST_ROLE").as_deref() {
        Ok("client") => play_client(),
        Ok("daemon") => play_daemon(),
        _ => {}
    }
}

fn play_client() {
    let address = socket_address(&std::env::var("HSMD_TEST_DOOR").unwrap());
    let mut connection = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        if let Some(uid) = line.strip_prefix("become ") {
            let uid = uid.parse().unwrap();
            setgroups(&[]).unwrap();
            setgid(Gid::from_raw(uid)).unwrap();
            setuid(Uid::from_raw(uid)).unwrap();
        } else if line == "connect" {
            connection = Some(UnixStream::connect_addr(&address).unwrap());
            say(format!("connected as {}", geteuid()));
        } else if line == "leave" {
            let connection = OwnedFd::from(connection.take().unwrap());
            let heir = Command::new("sleep")
                .arg("60")
                .stdin(connection)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            say(heir.unwrap().id());
        }
    }
}

fn play_daemon() {
    let listener = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let is_path = listener.local_addr().unwrap().as_pathname().is_some();
    let kind = if is_path {
        EndpointKind::Path
    } else {
        EndpointKind::Abstract
    };
    let folder = |name: &str| PathBuf::from(std::env::var_os(name).unwrap());
    let rules = Rules {
        host_proc: folder("HSMD_TEST_HOST_PROC"),
        pod_logs: folder("HSMD_TEST_POD_LOGS"),
        ..Rules::default()
    };
    let connection = listener.accept().unwrap().0;
    let mut hoard = Vec::new();
    if let Some(left) = std::env::var("HSMD_TEST_DESCRIPTORS")
        .ok()
        .filter(|left| !left.is_empty())
    {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 128, hard).unwrap();
        hoard.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));
        hoard.truncate(hoard.len() - left.parse::<usize>().unwrap());
    }
    let verdict = admit(&connection, kind, &rules);
    drop(hoard);
    match verdict {
        Ok(peer) => match peer.pod_uid {
            Some(pod) => say(format!("admitted {} in {pod}", peer.uid)),
            None => say(format!("admitted {} unseen", peer.uid)),
        },
        Err(refusal) => say(format!("refused {}", refusal.label())),
    }
}
