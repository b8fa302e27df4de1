//! A node to try peers on: cgroups, pod logs, sockets, and this program again as another process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, geteuid, setgid, setgroups, setuid};
use tempfile::TempDir;

use crate::peer::{EndpointKind, Peer, Refusal, Rules, admit};

pub(crate) const API_SERVER: &str = "c3b1fa1f2d6d4f4f8d3a5b6c7d8e9f00";
pub(crate) const OTHER_STATIC_POD: &str = "0123456789abcdef0123456789abcdef";
pub(crate) const ORDINARY_POD: &str = "1f2e3d4c-5b6a-4798-8899-aabbccddeeff";
pub(crate) const NOBODY: u32 = 65534;

/// A node's cgroups, pod logs and sockets, for one test.
pub(crate) struct Node {
    cgroups: PathBuf,
    pub(crate) folder: TempDir,
    pub(crate) rules: Rules,
}

impl Node {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn abstract_door(&self) -> Door {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Door::open(format!(
            "@hsmd-peers-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ))
    }

    pub(crate) fn path_door(&self) -> Door {
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
    pub(crate) fn client(&self, uid: u32, cgroup: &str, door: &Door) -> Actor {
        let client = self.command(&[], "client", cgroup);
        let mut client = client_at(client, door);
        client.tell(&format!("become {uid}"));
        client.tell("connect");
        assert_eq!(client.hear(), format!("connected as {uid}"));
        client
    }

    /// Another process that judges the next peer at this door; with only so many descriptors to
    /// spare, if it is said.
    pub(crate) fn daemon(&self, before: &[&str], door: &Door, descriptors: &str) -> Actor {
        let listener = OwnedFd::from(door.listener.try_clone().unwrap());
        Actor::new(
            self.command(before, "daemon", "hsmd")
                .env("HSMD_TEST_DESCRIPTORS", descriptors)
                .stdin(listener),
        )
    }

    /// What becomes of the next peer at a door.
    pub(crate) fn judge(&self, door: &Door) -> Result<Option<String>, &'static str> {
        verdict(admit(&door.accept(), door.kind(), &self.rules))
    }

    /// This program again, in a cgroup and behind other programs that make namespaces for it.
    pub(crate) fn command(&self, before: &[&str], role: &str, cgroup: &str) -> Command {
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
                "node::a_process_plays_the_part_it_is_given",
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

pub(crate) fn verdict(judged: Result<Peer, Refusal>) -> Result<Option<String>, &'static str> {
    match judged {
        Ok(peer) => {
            assert_eq!(peer.uid, NOBODY);
            Ok(peer.pod_uid)
        }
        Err(refusal) => Err(refusal.label()),
    }
}

pub(crate) fn client_at(mut command: Command, door: &Door) -> Actor {
    Actor::new(
        command
            .env("HSMD_TEST_DOOR", &door.address)
            .stdin(Stdio::piped()),
    )
}

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct Door {
    /// A path, or a name that begins with `@`.
    address: String,
    listener: UnixListener,
}

impl Door {
    fn open(address: String) -> Self {
        let listener = UnixListener::bind_addr(&socket_address(&address)).unwrap();
        Self { address, listener }
    }

    pub(crate) fn kind(&self) -> EndpointKind {
        if self.address.starts_with('@') {
            EndpointKind::Abstract
        } else {
            EndpointKind::Path
        }
    }

    pub(crate) fn accept(&self) -> UnixStream {
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
pub(crate) struct Actor {
    pub(crate) child: Child,
    tell: Option<ChildStdin>,
    hear: BufReader<ChildStdout>,
}

impl Actor {
    pub(crate) fn new(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let tell = child.stdin.take();
        let hear = BufReader::new(child.stdout.take().unwrap());
        Self { child, tell, hear }
    }

    pub(crate) fn tell(&mut self, what: &str) {
        writeln!(self.tell.as_mut().unwrap(), "{what}").unwrap();
    }

    /// The next thing it says; the test harness in it says things, too.
    pub(crate) fn hear(&mut self) -> String {
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
    pub(crate) fn leave_the_connection_to_another(&mut self) -> Heir {
        self.tell("leave");
        let heir = self.hear().parse().unwrap();
        self.tell = None;
        Heir(Pid::from_raw(heir))
    }
}

/// Who holds a connection that another has made.
pub(crate) struct Heir(Pid);

impl Drop for Heir {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
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
