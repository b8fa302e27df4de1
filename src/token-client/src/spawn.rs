//! Starts hosts, ends them, and knows which processes they are.
//!
//! Each token has one thread that starts its hosts and waits for them, and lives as long as the
//! token: the host asks the kernel to be killed when the *thread* that started it ends, so no
//! borrowed thread will do. A pid is given to `kill` only while the process has not been waited for,
//! so that it cannot be another's by then; [`HOSTS`] is the lock under which both happen.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::config::{Isolation, Launch, Loader};

/// The descriptor on which the host finds its end of the channel.
const CHANNEL_FD: i32 = 3;

/// Pids of all hosts that were started and not yet waited for. Held for moments only.
static HOSTS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Starts under way: there are children whose pids nobody knows yet. No lock, for a start waits for
/// the disk that the program is on.
static STARTING: AtomicUsize = AtomicUsize::new(0);

fn hosts() -> MutexGuard<'static, BTreeSet<i32>> {
    HOSTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this crate waits for the child process, or may do so: while a host is being started, any
/// child may be it. A daemon that is PID 1 must not wait for those, for their exit status would be
/// lost; it looks again a little later.
pub fn owns(pid: u32) -> bool {
    // In this order: a start that ends in between has put its pid among the hosts.
    STARTING.load(Ordering::SeqCst) > 0
        || i32::try_from(pid).is_ok_and(|pid| hosts().contains(&pid))
}

/// One token's thread. Dropping it lets the thread end after the host that it waits for.
pub(crate) struct Launcher {
    launch: Arc<Launch>,
    jobs: mpsc::SyncSender<Job>,
}

struct Job {
    command: Command,
    started: oneshot::Sender<io::Result<Process>>,
}

impl Launcher {
    pub(crate) fn new(token: &str, launch: Arc<Launch>) -> io::Result<Self> {
        let (jobs, todo) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name(format!("host {token}"))
            .spawn(move || run(&todo))?;
        Ok(Self { launch, jobs })
    }

    /// Starts a host with `channel` as its end of the socketpair. What it writes comes out of the
    /// pipe that is returned.
    ///
    /// Waits while an earlier host has not ended: two hosts of one token never run side by side.
    pub(crate) async fn start(&self, channel: OwnedFd) -> io::Result<(Process, OwnedFd)> {
        let (output, input) = io::pipe()?;
        let mut command = command(&self.launch);
        command
            .stdin(Stdio::null())
            .stdout(input.try_clone()?)
            .stderr(input)
            .fd_mappings(vec![FdMapping {
                parent_fd: channel,
                child_fd: CHANNEL_FD,
            }])
            .map_err(io::Error::other)?;
        let (started, process) = oneshot::channel();
        let busy = || io::Error::other("the one before was killed and has not ended");
        self.jobs
            .try_send(Job { command, started })
            .map_err(|_| busy())?;
        let process = process.await.map_err(|_| busy())??;
        Ok((process, output.into()))
    }
}

/// A host that was started. Dropping it kills it.
pub(crate) struct Process {
    pid: i32,
    waited_for: Arc<AtomicBool>,
    status: oneshot::Receiver<Option<ExitStatus>>,
    how: Option<String>,
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Kills the host and what it started in its process group. It may end a while later.
    pub(crate) fn kill(&self) {
        let _waits = hosts();
        if !self.waited_for.load(Ordering::Relaxed) {
            end(self.pid);
        }
    }

    /// How the host ended, once it has.
    pub(crate) async fn ended(&mut self) -> String {
        if let Some(how) = &self.how {
            return how.clone();
        }
        let how = match (&mut self.status).await {
            Ok(Some(status)) => describe(status),
            _ => "ended unseen".to_owned(),
        };
        self.how.insert(how).clone()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn end(pid: i32) {
    let pid = Pid::from_raw(pid);
    end_group(pid);
    if kill(pid, Signal::SIGKILL) == Err(Errno::EPERM) {
        tracing::error!(
            host_pid = pid.as_raw(),
            "The module host runs as another user and cannot be killed: this takes CAP_KILL."
        );
    }
}

// A host that has left its process group, as an isolated one does, has none to end.
fn end_group(pid: Pid) {
    let _ = killpg(pid, Signal::SIGKILL);
}

fn run(todo: &mpsc::Receiver<Job>) {
    while let Ok(Job {
        mut command,
        started,
    }) = todo.recv()
    {
        if started.is_closed() {
            continue;
        }
        STARTING.fetch_add(1, Ordering::SeqCst);
        let spawned = command.spawn();
        if let Ok(child) = &spawned {
            hosts().insert(child.id().cast_signed());
        }
        STARTING.fetch_sub(1, Ordering::SeqCst);
        let child = match spawned {
            Ok(child) => child,
            Err(e) => {
                let program = command.get_program().display();
                let e = io::Error::new(e.kind(), format!("{program}: {e}"));
                // Nobody waits for a host any more: then nobody needs to know either.
                let _ = started.send(Err(e));
                continue;
            }
        };
        // Its copies of the host's ends of socket and pipe go now: while they are open the host's
        // death would not be seen as an end of file.
        drop(command);
        let waited_for = Arc::new(AtomicBool::new(false));
        let (ended, status) = oneshot::channel();
        let process = Process {
            pid: child.id().cast_signed(),
            waited_for: Arc::clone(&waited_for),
            status,
            how: None,
        };
        // If nobody waits for it, it is dropped here, which kills it.
        drop(started.send(Ok(process)));
        let status = wait(child, &waited_for);
        let _ = ended.send(status);
    }
}

/// Waits for the end, then takes the status under the lock: until then the pid stays the host's.
fn wait(mut child: Child, waited_for: &AtomicBool) -> Option<ExitStatus> {
    let pid = Pid::from_raw(child.id().cast_signed());
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    while waitid(Id::Pid(pid), look) == Err(Errno::EINTR) {}
    let mut known = hosts();
    // What the vendor's code has left behind in the process group goes with it.
    end_group(pid);
    let status = child.wait().ok();
    waited_for.store(true, Ordering::Relaxed);
    known.remove(&pid.as_raw());
    status
}

fn command(launch: &Launch) -> Command {
    let mut command = match &launch.loader {
        None => Command::new(&launch.program),
        Some(Loader {
            ld_so,
            library_path,
        }) => {
            let folders: Vec<&OsStr> = library_path.iter().map(|p| p.as_os_str()).collect();
            let mut command = Command::new(ld_so);
            command
                .arg("--library-path")
                .arg(folders.join(OsStr::new(":")))
                .arg(&launch.program);
            command
        }
    };
    command.args(["--session-socket", &CHANNEL_FD.to_string()]);
    match &launch.isolation {
        None => {
            command.arg("--no-isolation");
        }
        Some(Isolation {
            uid,
            gid,
            read_only,
            read_write,
        }) => {
            command.args(["--uid", &uid.to_string(), "--gid", &gid.to_string()]);
            for path in read_only {
                command.arg("--read-only").arg(path);
            }
            for path in read_write {
                command.arg("--read-write").arg(path);
            }
        }
    }
    command
        .env_clear()
        .envs(launch.env.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        // Its own group: a Ctrl-C at the daemon's terminal is the daemon's to handle, and what the
        // module forks can be ended with it.
        .process_group(0);
    command
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("was killed by {name}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, None) => format!("ended: {status}"),
    }
}
