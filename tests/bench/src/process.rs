//! The processes around a measurement: who the caller is, servers that end with us, and what the kernel says of them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::Args as ClapArgs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use tokio::process::{Child, Command};

use crate::error::BenchError;

/// Who kube-apiserver is: hsmd answers nobody else.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Caller {
    /// Be this user and group while calling; needs root
    #[arg(long = "caller-uid")]
    uid: Option<u32>,
    /// Be in this cgroup while calling; needs root
    #[arg(long = "caller-cgroup")]
    cgroup: Option<PathBuf>,
}

impl Caller {
    /// Becomes the caller, for good. Before any thread is started: the kernel's user is a thread's.
    pub(crate) fn become_it(&self) -> Result<(), BenchError> {
        if let Some(cgroup) = &self.cgroup {
            let path = cgroup.join("cgroup.procs");
            let own = std::process::id().to_string();
            fs::write(&path, own).map_err(|source| BenchError::File {
                doing: "enter the cgroup by",
                path,
                source,
            })?;
        }
        if let Some(uid) = self.uid {
            let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
            setgroups(&[])
                .and_then(|()| setresgid(group, group, group))
                .and_then(|()| setresuid(user, user, user))
                .map_err(|source| BenchError::Io {
                    doing: "become the calling user",
                    source: source.into(),
                })?;
        }
        Ok(())
    }

    /// The same, for a subcommand of this program.
    pub(crate) fn pass_on(&self, command: &mut Command) {
        if let Some(uid) = self.uid {
            command.args(["--caller-uid", &uid.to_string()]);
        }
        if let Some(cgroup) = &self.cgroup {
            command.arg("--caller-cgroup").arg(cgroup);
        }
    }

    /// Lets the caller connect to a socket whose server made it for itself.
    pub(crate) fn own(&self, socket: &Path) -> Result<(), BenchError> {
        std::os::unix::fs::chown(socket, self.uid, self.uid).map_err(|source| BenchError::File {
            doing: "give the caller",
            path: socket.to_owned(),
            source,
        })
    }
}

/// This program again.
pub(crate) fn own_program() -> Result<Command, BenchError> {
    let program = std::env::current_exe().map_err(|source| BenchError::Io {
        doing: "find the own program",
        source,
    })?;
    Ok(Command::new(program))
}

/// A server that is measured; killed when dropped.
pub(crate) struct Server {
    name: &'static str,
    child: Child,
}

impl Server {
    /// Starts it, with its output at the end of `log`.
    pub(crate) fn start(
        name: &'static str,
        mut command: Command,
        log: &Path,
    ) -> Result<Self, BenchError> {
        let open = || fs::OpenOptions::new().create(true).append(true).open(log);
        let (output, errors) = open()
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(|source| BenchError::File {
                doing: "write",
                path: log.to_owned(),
                source,
            })?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| cannot_start(&command, source))?;
        Ok(Self { name, child })
    }

    /// Waits until its socket is there.
    pub(crate) async fn listening(&mut self, socket: &Path) -> Result<(), BenchError> {
        for _ in 0..1000 {
            if socket.exists() {
                return Ok(());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.did(format!("ended before it listened: {status}")));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(self.did(format!(
            "did not listen on {} within 10 s",
            socket.display()
        )))
    }

    /// Ends it as a service manager would.
    pub(crate) async fn stop(mut self) -> Result<(), BenchError> {
        let Some(pid) = self.pid() else {
            return Err(self.did("ended by itself".to_owned()));
        };
        // Fails only when the process is gone, which the wait below shows.
        let _ = kill(pid, Signal::SIGTERM);
        match tokio::time::timeout(Duration::from_secs(5), self.child.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.did("did not end within 5 s of SIGTERM".to_owned())),
        }
    }

    /// Peak of its resident memory in megabytes of 10⁶ bytes.
    pub(crate) fn peak_memory_mb(&self) -> Option<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()?)).ok()?;
        let kib: f64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()?;
        Some(kib * 1024.0 / 1e6)
    }

    /// Every process below it, as they are now.
    pub(crate) fn descendants(&self) -> Vec<Pid> {
        let mut found: Vec<Pid> = self.pid().into_iter().collect();
        let parents = parents();
        let mut next = 0;
        while let Some(&parent) = found.get(next) {
            found.extend(
                parents
                    .iter()
                    .filter(|(_, of)| *of == parent)
                    .map(|(pid, _)| *pid),
            );
            next += 1;
        }
        found.into_iter().skip(1).collect()
    }

    pub(crate) fn did(&self, what: String) -> BenchError {
        BenchError::Process {
            who: self.name.to_owned(),
            what,
        }
    }

    fn pid(&self) -> Option<Pid> {
        Some(Pid::from_raw(i32::try_from(self.child.id()?).ok()?))
    }
}

pub(crate) fn cannot_start(command: &Command, source: std::io::Error) -> BenchError {
    let path = PathBuf::from(command.as_std().get_program());
    BenchError::File {
        doing: "start",
        path,
        source,
    }
}

/// Every process and its parent.
fn parents() -> Vec<(Pid, Pid)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name in parentheses may hold anything; after it come state and parent.
            let parent = stat
                .rsplit_once(')')?
                .1
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()?;
            Some((Pid::from_raw(pid), Pid::from_raw(parent)))
        })
        .collect()
}

/// How much of the processors' time is in use, in percent, over the next second.
pub(crate) async fn busy_percent() -> f64 {
    let before = processor_time();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = processor_time();
    match (before, after) {
        (Some((idle, all)), Some((then_idle, then_all))) if then_all > all => {
            100.0 - 100.0 * (then_idle - idle) / (then_all - all)
        }
        _ => f64::NAN,
    }
}

/// Ticks that all processors were idle, and all ticks (proc(5), `/proc/stat`).
fn processor_time() -> Option<(f64, f64)> {
    let line = kernel_says("/proc/stat", "cpu ")?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .flat_map(str::parse)
        .collect();
    // Idle and waiting for a disk. The last two of the ten are counted in the first two already.
    Some((ticks.get(3)? + ticks.get(4)?, ticks.iter().take(8).sum()))
}

/// The first line of a file in /proc that starts so, or the whole first line.
pub(crate) fn kernel_says(path: impl AsRef<OsStr>, start: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new(path.as_ref())).ok()?;
    text.lines()
        .find(|line| line.starts_with(start))
        .map(str::to_owned)
}
