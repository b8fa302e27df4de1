//! A SoftHSM token in a temporary folder, and [`Token`]s over it with the real hsm-token program.
//! What the machine lacks fails the test by name.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant as Clock};

use hsm_token_client::{Config, Launch, PinSource, State, Token, TokenError};
use hsm_wire::envelope::Wrap;
use hsm_wire::host::{Description, KeyRef};
use hsm_wire::secret::Secret;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

/// Debian's, also on Ubuntu.
pub(crate) const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
pub(crate) const LABEL: &str = "rciis-production";
pub(crate) const KEY_LABEL: &str = "k8s-secrets-kek";
pub(crate) const PIN: &str = "648219";
pub(crate) const SECOND: Duration = Duration::from_secs(1);
/// Far above what any step takes on a busy machine, where the test is not about how long it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The host program of this build.
pub(crate) fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            // …/target/debug/deps/this-test
            let test = std::env::current_exe().expect("path of this test");
            let folder = test.ancestors().nth(2).expect("target folder");
            let program = folder.join("hsm-token");
            if !program.exists() {
                let mut build = Command::new(env!("CARGO"));
                build.args(["build", "--quiet", "--package", "hsm-token"]);
                if folder.file_name() == Some(OsStr::new("release")) {
                    build.arg("--release");
                }
                let built = build.status().is_ok_and(|status| status.success());
                assert!(
                    built && program.exists(),
                    "{} is missing: run `cargo build -p hsm-token`",
                    program.display()
                );
            }
            program
        })
        .clone()
}

/// A token in a folder.
pub(crate) struct SoftHsm {
    pub(crate) folder: TempDir,
}

impl SoftHsm {
    /// A token with one AES-256 key.
    pub(crate) fn new() -> Self {
        for (program, package) in [("softhsm2-util", "softhsm2"), ("pkcs11-tool", "opensc")] {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|folder| folder.join(program).exists())
            });
            assert!(found, "`{program}` is missing: apt-get install {package}");
        }
        let folder = TempDir::with_prefix("hsm-token-client-").expect("temporary folder");
        let this = Self { folder };
        fs::create_dir(this.tokens()).expect("token folder");
        let conf = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            this.tokens().display()
        );
        fs::write(this.conf(), conf).expect("softhsm2.conf");
        let init = [
            "--init-token",
            "--free",
            "--label",
            LABEL,
            "--pin",
            PIN,
            "--so-pin",
            PIN,
        ];
        this.run("softhsm2-util", &init);
        this.add_key(KEY_LABEL, "01");
        this
    }

    pub(crate) fn add_key(&self, label: &str, id: &str) {
        let login = [
            "--module",
            SOFTHSM,
            "--token-label",
            LABEL,
            "--login",
            "--pin",
            PIN,
        ];
        let make = [
            "--keygen",
            "--key-type",
            "AES:32",
            "--sensitive",
            "--label",
            label,
            "--id",
            id,
        ];
        self.run("pkcs11-tool", &[&login[..], &make].concat());
    }

    pub(crate) fn tokens(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.folder.path().join("softhsm2.conf")
    }

    fn run(&self, program: &str, args: &[&str]) {
        let output = Command::new(program)
            .args(args)
            .env("SOFTHSM2_CONF", self.conf())
            .output()
            .unwrap_or_else(|error| panic!("`{program}` does not start: {error}"));
        assert!(
            output.status.success(),
            "{program} {args:?} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// A token with the right PIN.
    pub(crate) fn config(&self) -> Config {
        Config {
            name: "main".into(),
            uri: format!("pkcs11:token={LABEL}"),
            module: SOFTHSM.into(),
            sessions: 4,
            call_timeout: 2 * SECOND,
            pin: Some(Arc::new(CountedPin::new(PIN))),
            pin_generation: 1,
            state_dirs: vec![
                self.folder.path().join("run"),
                self.folder.path().join("var"),
            ],
            launch: Launch {
                program: program(),
                loader: None,
                isolation: None,
                env: vec![("SOFTHSM2_CONF".into(), self.conf().display().to_string())],
            },
        }
    }
}

/// A PIN that says how many hosts it was read for.
pub(crate) struct CountedPin {
    pin: &'static str,
    pub(crate) reads: AtomicU32,
}

impl CountedPin {
    pub(crate) fn new(pin: &'static str) -> Self {
        Self {
            pin,
            reads: AtomicU32::new(0),
        }
    }
}

impl PinSource for CountedPin {
    fn read(&self) -> Result<Secret, String> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        Ok(Secret::copy_of(self.pin.as_bytes()))
    }
}

pub(crate) fn is_up(state: &State) -> bool {
    matches!(state, State::Up { .. })
}

pub(crate) fn is_down(state: &State) -> bool {
    matches!(state, State::Down { .. })
}

pub(crate) fn is_latched(state: &State) -> bool {
    matches!(state, State::Latched { .. })
}

/// Waits for a state, and gives it and how long that took.
pub(crate) async fn wait_for(token: &Token, wanted: impl Fn(&State) -> bool) -> (State, Duration) {
    let started = Clock::now();
    let mut state = token.state();
    let found = timeout(PATIENCE, state.wait_for(|s| wanted(s))).await;
    let found = match found {
        Ok(found) => found.expect("the token is supervised").clone(),
        Err(_) => panic!(
            "after {PATIENCE:?} the token is {:?}",
            *token.state().borrow()
        ),
    };
    (found, started.elapsed())
}

/// The reason of a state that has one.
pub(crate) fn reason(state: &State) -> String {
    match state {
        State::Down { reason, .. } | State::Latched { reason, .. } => reason.clone(),
        State::Starting | State::Up { .. } => String::new(),
    }
}

/// A token that is up, with its key and a seed that was sealed on it.
pub(crate) struct Bench {
    pub(crate) token: Token,
    pub(crate) key: KeyRef,
    pub(crate) sealed: Vec<u8>,
}

impl Bench {
    pub(crate) async fn new(config: Config) -> Self {
        let token = Token::start(config);
        let key = describe(&token).await.keys[0].key.clone();
        let deadline = Instant::now() + PATIENCE;
        let seed = Secret::copy_of(&[7; 32]);
        let sealed = token
            .seal(&key, Wrap::AES_GCM, b"aad".to_vec(), seed, deadline)
            .await
            .expect("seal");
        Self { token, key, sealed }
    }

    pub(crate) async fn unseal(&self, within: Duration) -> Result<(), TokenError> {
        let deadline = Instant::now() + within;
        let (aad, sealed) = (b"aad".to_vec(), self.sealed.clone());
        let seed = self
            .token
            .unseal(&self.key, Wrap::AES_GCM, aad, sealed, 32, deadline)
            .await?;
        assert_eq!(seed.expose(), [7; 32]);
        Ok(())
    }

    pub(crate) fn host(&self) -> Pid {
        match &*self.token.state().borrow() {
            State::Up {
                host_pid: Some(pid),
                ..
            } => Pid::from_raw(pid.cast_signed()),
            state => panic!("no host: {state:?}"),
        }
    }

    /// The host, as soon as it is another one. One that is being killed may answer first.
    pub(crate) async fn other_host(&self, before: Pid) -> Pid {
        let before = before.as_raw().unsigned_abs();
        let other =
            |s: &State| matches!(s, State::Up { host_pid, .. } if *host_pid != Some(before));
        wait_for(&self.token, other).await;
        self.host()
    }

    /// Stops the host, and returns when each of its threads is stopped.
    pub(crate) async fn stop_host(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.host());
        let is_stopped = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).expect("stat");
            stat.contains(") T ")
        };
        while !fs::read_dir(&tasks)
            .expect("tasks")
            .all(|task| is_stopped(task.expect("task")))
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.host(), signal).expect("the host is there");
    }
}

pub(crate) async fn describe(token: &Token) -> Arc<Description> {
    match wait_for(token, is_up).await.0 {
        State::Up { description, .. } => description,
        _ => unreachable!(),
    }
}

/// Lets the host's own user have the token.
pub(crate) fn give_away(path: &Path, id: u32) {
    std::os::unix::fs::chown(path, Some(id), Some(id)).expect("chown");
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("read folder") {
            give_away(&entry.expect("entry").path(), id);
        }
    }
}

/// A host program that is a script, in the place of hsm-token.
pub(crate) fn script(hsm: &SoftHsm, text: &str) -> Config {
    let path = hsm.folder.path().join("host.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    let mut config = hsm.config();
    config.launch.program = path;
    config
}
