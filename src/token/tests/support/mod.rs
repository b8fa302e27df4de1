//! A SoftHSM token in a temporary folder, and the real hsm-token program at the other end of a
//! socketpair. Needs root (namespaces, another uid) and SoftHSM, OpenSC and a C compiler; what is
//! missing fails the test by name.
#![allow(dead_code, reason = "each test program uses its own part of this")]

pub(crate) mod hostile;

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hsm_wire::envelope::Wrap;
use hsm_wire::fault::Fault;
use hsm_wire::host::{
    Answer, Description, KeyRef, LatchNote, MAX_MESSAGE_LEN, Open, Request, Response,
};
use hsm_wire::secret::Secret;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use tempfile::TempDir;

/// Debian's, also on Ubuntu.
pub(crate) const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
pub(crate) const LABEL: &str = "rciis-production";
pub(crate) const KEY_LABEL: &str = "k8s-secrets-kek";
pub(crate) const PIN: &str = "648219";
/// Far above what any request takes; a test that waits so long has found a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The module's user and group in tests.
pub(crate) const ID: u32 = 64500;

/// A token in a folder that the module's user owns.
pub(crate) struct SoftHsm {
    pub(crate) folder: TempDir,
}

impl SoftHsm {
    /// A token with one AES-256 key, label [`KEY_LABEL`], id 01.
    pub(crate) fn new() -> Self {
        let this = Self::without_key();
        this.add_key(KEY_LABEL, "01");
        this
    }

    pub(crate) fn without_key() -> Self {
        for (program, package) in [("softhsm2-util", "softhsm2"), ("pkcs11-tool", "opensc")] {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|folder| folder.join(program).exists())
            });
            assert!(found, "`{program}` is missing: apt-get install {package}");
        }
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests need root: they make namespaces and change the user"
        );
        let folder = TempDir::with_prefix("hsm-token-test-").expect("temporary folder");
        let this = Self { folder };
        fs::create_dir(this.tokens()).expect("token folder");
        fs::write(
            this.conf(),
            format!(
                "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
                this.tokens().display()
            ),
        )
        .expect("softhsm2.conf");
        this.run(
            "softhsm2-util",
            &[
                "--init-token",
                "--free",
                "--label",
                LABEL,
                "--pin",
                PIN,
                "--so-pin",
                "87654321",
            ],
        );
        this.give_away();
        this
    }

    /// Another AES-256 key, as `pkcs11-tool` makes it.
    pub(crate) fn add_key(&self, label: &str, id: &str) {
        self.run(
            "pkcs11-tool",
            &[
                "--module",
                SOFTHSM,
                "--token-label",
                LABEL,
                "--login",
                "--pin",
                PIN,
                "--keygen",
                "--key-type",
                "AES:32",
                "--label",
                label,
                "--id",
                id,
                "--sensitive",
            ],
        );
        self.give_away();
    }

    pub(crate) fn tokens(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.folder.path().join("softhsm2.conf")
    }

    pub(crate) fn env(&self) -> Vec<(String, String)> {
        vec![(
            "SOFTHSM2_CONF".to_owned(),
            self.conf().display().to_string(),
        )]
    }

    /// The serial number, as softhsm2-util shows it.
    pub(crate) fn serial(&self) -> String {
        let slots = self.run("softhsm2-util", &["--show-slots"]);
        slots
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Serial number:"))
            .map(|serial| serial.trim().to_owned())
            .find(|serial| !serial.is_empty())
            .expect("a serial number")
    }

    pub(crate) fn run(&self, program: &str, args: &[&str]) -> String {
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
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// To the module's user.
    pub(crate) fn give_away(&self) {
        give_away(&self.tokens());
    }
}

/// Makes `path` and all below it the module's user's.
pub(crate) fn give_away(path: &Path) {
    std::os::unix::fs::chown(path, Some(ID), Some(ID)).expect("chown");
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("read folder") {
            give_away(&entry.expect("entry").path());
        }
    }
}

/// How to start a host.
#[derive(Clone)]
pub(crate) struct Start {
    pub(crate) program: PathBuf,
    /// Before the program: loader and its options.
    pub(crate) loader: Vec<String>,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// A system call that fails with EPERM, as a container runtime's filter has it.
    pub(crate) forbidden: Option<i64>,
}

impl Start {
    pub(crate) fn plain(env: Vec<(String, String)>) -> Self {
        Self {
            program: env!("CARGO_BIN_EXE_hsm-token").into(),
            loader: Vec::new(),
            args: vec!["--no-isolation".to_owned()],
            env,
            forbidden: None,
        }
    }

    pub(crate) fn isolated(
        env: Vec<(String, String)>,
        read_only: &[&Path],
        read_write: &[&Path],
    ) -> Self {
        let mut args: Vec<String> = ["--uid", "64500", "--gid", "64500"]
            .map(String::from)
            .into();
        for path in read_only {
            args.extend(["--read-only".to_owned(), path.display().to_string()]);
        }
        for path in read_write {
            args.extend(["--read-write".to_owned(), path.display().to_string()]);
        }
        Self {
            args,
            ..Self::plain(env)
        }
    }

    /// As a daemon would start a host for this token.
    pub(crate) fn for_token(token: &SoftHsm) -> Self {
        Self::isolated(token.env(), &[&token.conf()], &[&token.tokens()])
    }
}

/// Installs a seccomp filter that refuses one system call and allows all others.
fn forbid(syscall: i64) -> std::io::Result<()> {
    use nix::libc::{self, sock_filter, sock_fprog};
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let op = |code: u32, jt, jf, k| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        // The call's number is the first field of seccomp_data.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            syscall as u32,
        ),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, REFUSE),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, ALLOW),
    ];
    let program = sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: PR_SET_SECCOMP takes a pointer to a sock_fprog, which lives through the call.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER as libc::c_ulong,
            &raw const program,
        )
    };
    if done == -1 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// A running host.
pub(crate) struct Host {
    pub(crate) child: Child,
    socket: Option<OwnedFd>,
    output: Arc<Mutex<String>>,
    next_id: u64,
}

impl Host {
    pub(crate) fn start(start: &Start) -> Self {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .expect("socketpair");
        let mut command = match start.loader.split_first() {
            None => Command::new(&start.program),
            Some((loader, options)) => {
                let mut command = Command::new(loader);
                command.args(options).arg(&start.program);
                command
            }
        };
        command
            .args(["--session-socket", "3"])
            .args(&start.args)
            .env_clear()
            .envs(start.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let raw = theirs.as_raw_fd();
        let forbidden = start.forbidden;
        // SAFETY: only dup2, fcntl and prctl are called between fork and exec, and nothing allocates.
        unsafe {
            command.pre_exec(move || {
                if raw == 3 {
                    let fd = std::os::fd::BorrowedFd::borrow_raw(3);
                    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
                } else if nix::libc::dup2(raw, 3) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
                forbidden.map_or(Ok(()), forbid)
            });
        }
        let mut child = command.spawn().expect("hsm-token starts");
        let output = Arc::new(Mutex::new(String::new()));
        drain(child.stdout.take().expect("stdout"), "out: ", &output);
        drain(child.stderr.take().expect("stderr"), "", &output);
        Self {
            child,
            socket: Some(ours),
            output,
            next_id: 1,
        }
    }

    /// Starts a host and opens the token; panics with the host's output if that fails.
    pub(crate) fn open(start: &Start, open: Open) -> Self {
        let mut host = Self::start(start);
        match host.ask(&Request::Open(open)).outcome {
            Ok(Answer::Opened(info)) => assert_eq!(info.label, LABEL),
            other => panic!("open: {other:?}\n{}", host.output()),
        }
        host
    }

    /// Sends a request and returns its id.
    pub(crate) fn send(&mut self, request: &Request) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.send_raw(&request.encode(id));
        id
    }

    pub(crate) fn send_raw(&self, packet: &[u8]) {
        send(self.raw(), packet, MsgFlags::MSG_NOSIGNAL).expect("send");
    }

    /// The next response; None when the host is gone.
    pub(crate) fn receive(&self, patience: Duration) -> Option<Response> {
        let socket = self.socket.as_ref().expect("socket");
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(socket),
            PollFlags::POLLIN,
        )];
        let timeout = PollTimeout::try_from(patience).expect("timeout");
        if poll(&mut fds, timeout).expect("poll") == 0 {
            panic!("no answer within {patience:?}\n{}", self.output());
        }
        let mut packet = vec![0; MAX_MESSAGE_LEN];
        match recv(self.raw(), &mut packet, MsgFlags::empty()) {
            Ok(0) | Err(nix::errno::Errno::ECONNRESET) => None,
            Ok(n) => Some(Response::decode(&packet[..n]).expect("well-formed response")),
            Err(error) => panic!("receive: {error}"),
        }
    }

    /// True if nothing comes within `patience`.
    pub(crate) fn is_silent_for(&self, patience: Duration) -> bool {
        let socket = self.socket.as_ref().expect("socket");
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(socket),
            PollFlags::POLLIN,
        )];
        poll(&mut fds, PollTimeout::try_from(patience).expect("timeout")).expect("poll") == 0
    }

    /// Sends a request and waits for its response.
    pub(crate) fn ask(&mut self, request: &Request) -> Response {
        let id = self.send(request);
        let Some(response) = self.receive(PATIENCE) else {
            panic!("the host is gone\n{}", self.output());
        };
        assert_eq!(response.id, id);
        response
    }

    pub(crate) fn describe(&mut self) -> Description {
        match self.ask(&Request::Describe).outcome {
            Ok(Answer::Described(description)) => description,
            other => panic!("describe: {other:?}\n{}", self.output()),
        }
    }

    /// The one key of the token.
    pub(crate) fn key(&mut self) -> KeyRef {
        let description = self.describe();
        assert_eq!(description.keys.len(), 1, "{description:?}");
        description.keys[0].key.clone()
    }

    pub(crate) fn seal(
        &mut self,
        key: &KeyRef,
        aad: &[u8],
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        let response = self.ask(&seal(key, aad, plaintext));
        match response.outcome? {
            Answer::Sealed(sealed) => Ok(sealed),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn unseal(
        &mut self,
        key: &KeyRef,
        aad: &[u8],
        sealed: &[u8],
        len: usize,
    ) -> Result<Vec<u8>, Fault> {
        let response = self.ask(&unseal(key, aad, sealed, len));
        match response.outcome? {
            Answer::Unsealed(plaintext) => Ok(plaintext.expose().to_vec()),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn probe(&mut self, key: &KeyRef) -> Result<(), Fault> {
        let response = self.ask(&Request::Probe {
            key: key.clone(),
            wrap: Wrap::AES_GCM,
        });
        response
            .outcome
            .map(|answer| assert_eq!(answer, Answer::Probed))
    }

    /// Closes the socket, as a daemon that is gone.
    pub(crate) fn hang_up(&mut self) {
        self.socket = None;
    }

    pub(crate) fn wait(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the host does not end\n{}",
                self.output()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has written so far; lines from stdout begin with `out: `.
    pub(crate) fn output(&self) -> String {
        self.output.lock().expect("output").clone()
    }

    fn raw(&self) -> i32 {
        self.socket.as_ref().expect("socket").as_raw_fd()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn seal(key: &KeyRef, aad: &[u8], plaintext: &[u8]) -> Request {
    Request::Seal {
        key: key.clone(),
        wrap: Wrap::AES_GCM,
        aad: aad.to_vec(),
        plaintext: Secret::copy_of(plaintext),
    }
}

pub(crate) fn unseal(key: &KeyRef, aad: &[u8], sealed: &[u8], len: usize) -> Request {
    Request::Unseal {
        key: key.clone(),
        wrap: Wrap::AES_GCM,
        aad: aad.to_vec(),
        sealed: sealed.to_vec(),
        plaintext_len: u32::try_from(len).expect("length"),
    }
}

/// Open for the token of [`SoftHsm`].
pub(crate) fn open() -> Open {
    open_module(SOFTHSM)
}

pub(crate) fn open_module(module: impl AsRef<Path>) -> Open {
    Open {
        module: module.as_ref().display().to_string(),
        token: format!("pkcs11:token={LABEL}"),
        sessions: 4,
        pin: Some(Secret::copy_of(PIN.as_bytes())),
        pin_generation: 1,
        latched: Vec::new(),
    }
}

pub(crate) fn note(serial: &str, generation: u32) -> LatchNote {
    LatchNote {
        serial: serial.to_owned(),
        generation,
    }
}

fn drain(mut pipe: impl Read + Send + 'static, prefix: &'static str, to: &Arc<Mutex<String>>) {
    let to = Arc::clone(to);
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n) = pipe.read(&mut chunk) {
            if n == 0 {
                return;
            }
            let text = String::from_utf8_lossy(&chunk[..n]);
            let mut to = to.lock().expect("output");
            for line in text.lines() {
                to.push_str(prefix);
                to.push_str(line);
                to.push('\n');
            }
        }
    });
}
