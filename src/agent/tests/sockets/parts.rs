//! What the tests of sockets are made with: folders, names, and this program again as another process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{Backlog, listen as set_backlog};
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::listen::{self, Endpoint, Incoming, Listener, State};

pub(crate) const NOBODY: u32 = 65534;

pub(crate) fn folder() -> TempDir {
    assert!(
        geteuid().is_root(),
        "this test gives files to other users: run it as root"
    );
    tempfile::tempdir().unwrap()
}

pub(crate) fn at(path: &Path) -> Endpoint {
    Endpoint::path(path, 0o600, NOBODY, NOBODY).unwrap()
}

pub(crate) fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "hsmd-sockets-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

pub(crate) fn open(endpoint: Endpoint) -> (Listener, Incoming) {
    listen::open(endpoint, Path::new("/proc"))
}

fn socket_address(endpoint: &Endpoint) -> SocketAddr {
    match endpoint {
        Endpoint::Path { path, .. } => SocketAddr::from_pathname(path).unwrap(),
        Endpoint::Abstract(name) => SocketAddr::from_abstract_name(name).unwrap(),
    }
}

pub(crate) fn connect(endpoint: &Endpoint) -> std::io::Result<UnixStream> {
    UnixStream::connect_addr(&socket_address(endpoint))
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(crate) async fn becomes(state: &mut watch::Receiver<State>, is_so: impl Fn(&State) -> bool) {
    let seen = tokio::time::timeout(
        Duration::from_secs(10),
        state.wait_for(|state| is_so(state)),
    )
    .await
    .map(drop);
    assert!(seen.is_ok(), "still {:?}", state.borrow());
}

pub(crate) async fn eventually(is_so: impl Fn() -> bool) {
    for _ in 0..1000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 10 s");
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        tracing::subscriber::set_default(
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(move || log.clone())
                .finish(),
        )
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn count(&self, part: &str) -> usize {
        self.text()
            .lines()
            .filter(|line| line.contains(part))
            .count()
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(line)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Another process of this program. It ends with the test.
pub(crate) struct Actor {
    pub(crate) child: Child,
    hear: BufReader<ChildStdout>,
}

impl Actor {
    pub(crate) fn start(role: &str, place: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "parts::a_process_plays_the_part_it_is_given",
                "--nocapture",
            ])
            .env("HSMD_TEST_ROLE", role)
            .env("HSMD_TEST_PLACE", place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let hear = BufReader::new(child.stdout.take().unwrap());
        Self { child, hear }
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
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process of another user that listens there.
pub(crate) fn squatter_at(endpoint: &Endpoint) -> Actor {
    let mut squatter = Actor::start("squatter", &endpoint.to_string());
    assert_eq!(squatter.hear(), "squatting");
    squatter
}

const SAYS: &str = "HSMD-TEST-SAYS ";

fn say(what: &str) {
    println!("\n{SAYS}{what}");
}

/// Not a test: what this program does when a test has started it again.
#[test]
fn a_process_plays_the_part_it_is_given() {
    let place = std::env::var("HSMD_TEST_PLACE").unwrap_or_default();
    match std::env::var("HSMD_TEST_ROLE").as_deref() {
        Ok("squatter") => play_squatter(&place.parse().unwrap()),
        Ok("alarmed") => play_alarmed(place.parse().unwrap()),
        Ok("starved") => play_starved(place.parse().unwrap()),
        Ok("swapper") => play_swapper(Path::new(&place)),
        _ => {}
    }
}

fn become_nobody() {
    setgroups(&[]).unwrap();
    setgid(Gid::from_raw(NOBODY)).unwrap();
    setuid(Uid::from_raw(NOBODY)).unwrap();
}

fn play_squatter(endpoint: &Endpoint) {
    let listener = UnixListener::bind_addr(&socket_address(endpoint)).unwrap();
    become_nobody();
    // Who it is, is decided by listen.
    set_backlog(&listener, Backlog::new(8).unwrap()).unwrap();
    say("squatting");
    let _ = std::io::stdin().read(&mut [0]);
}

fn play_starved(endpoint: Endpoint) {
    let log = Log::default();
    let _logging = log.start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (_listener, mut incoming) = open(endpoint);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 128, hard).unwrap();
        let hoard: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        say("starved");
        eventually(|| log.count("cannot accept a connection") > 1).await;
        say("cannot accept");
        drop(hoard);
        incoming.next().await.unwrap();
        say("accepted");
    });
}

fn play_alarmed(endpoint: Endpoint) {
    let log = Log::default();
    let _logging = log.start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let (listener, _incoming) = open(endpoint);
        tokio::time::sleep(Duration::from_secs(60)).await;
        say(&format!("{} alarms", log.count("ALARM")));
        say(&log.text());
        tokio::time::resume();
        becomes(&mut listener.state(), |state| *state == State::Listening).await;
        say(&format!("{} alarms, then listening", log.count("ALARM")));
    });
}

/// Puts folders of its own, and links, in the place of those that begin with our prefix.
fn play_swapper(folder: &Path) {
    become_nobody();
    say("swapping");
    let away = folder.join("away");
    for count in 0_u64.. {
        let names = fs::read_dir(folder)
            .unwrap()
            .flatten()
            .map(|entry| entry.path());
        let Some(name) = names.into_iter().find(|path| is_private_folder(path)) else {
            continue;
        };
        if fs::rename(&name, &away).is_err() {
            continue;
        }
        if count % 2 == 0 {
            let _ = fs::create_dir(&name);
            let _ = fs::set_permissions(&name, fs::Permissions::from_mode(0o700));
            let _ = fs::remove_dir(&name);
        } else {
            let _ = symlink(&away, &name);
            let _ = fs::remove_file(&name);
        }
        let _ = fs::remove_dir(&away);
    }
}

fn is_private_folder(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with(".hsmd-"))
        && fs::symlink_metadata(path).is_ok_and(|file| file.uid() == 0)
}
