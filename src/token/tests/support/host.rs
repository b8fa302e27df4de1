//! The program under test, started and spoken to as the daemon does it.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hsm_wire::envelope::Wrap;
use hsm_wire::fault::Fault;
use hsm_wire::host::{Answer, Description, KeyRef, MAX_MESSAGE_LEN, Open, Request, Response};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use super::{LABEL, PATIENCE, SoftHsm, seal, unseal};

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
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
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
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
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
