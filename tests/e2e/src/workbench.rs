//! The workbench: a folder, a place among the cgroups, and processes that are gone when it is.
//!
//! Everything started on it dies with it: at its end, on a panic, on Ctrl-C (see [`Workbench::open`])
//! and, by PDEATHSIG, when the test process itself is killed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

use crate::KUBE_APISERVER_UID;

/// A place to build a node on.
pub struct Workbench {
    folder: tempfile::TempDir,
    pod: Pod,
}

/// The static pod that kube-apiserver seems to run in: cgroup and log folder as kubelet makes them.
struct Pod {
    cgroup: PathBuf,
    top: PathBuf,
    log: PathBuf,
}

/// A started program. Killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// Cgroups to empty when a signal ends us.
static TO_KILL: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static TO_REMOVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

impl Workbench {
    /// Makes folder and cgroup. Root is needed for the cgroup, the token's owner and the sockets.
    pub fn open() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("root is needed: for cgroups, for other users' processes and for their files");
        }
        let folder = tempfile::Builder::new()
            .prefix("talos-hsm-")
            .tempdir()
            .context("cannot make a temporary folder")?;
        // Three users work in it: ours, hsm-token's and kube-apiserver's.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let pod = Pod::make()?;
        TO_KILL
            .lock()
            .expect("no panic holds it")
            .push(pod.cgroup.clone());
        TO_REMOVE
            .lock()
            .expect("no panic holds it")
            .extend([folder.path().to_owned(), pod.log.clone()]);
        Ok(Self { folder, pod })
    }

    /// Ends everything and exits with 130 when the terminal or a supervisor says so. Call first, before
    /// any thread.
    pub fn clean_up_on_signals() -> Result<()> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block()?;
        std::thread::spawn(move || {
            let _ = signals.wait();
            eprintln!("\nstopping and cleaning up");
            if let Ok(cgroups) = TO_KILL.lock() {
                cgroups.iter().for_each(|cgroup| empty(cgroup));
            }
            // Our other children have PDEATHSIG; they end with us.
            if let Ok(folders) = TO_REMOVE.lock() {
                for folder in folders.iter() {
                    let _ = fs::remove_dir_all(folder);
                }
            }
            std::process::exit(130);
        });
        Ok(())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file for `owner`, mode 0600.
    pub fn write(&self, name: &str, text: &str, owner: u32) -> Result<PathBuf> {
        let path = self.path().join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        std::os::unix::fs::chown(&path, Some(owner), Some(owner))?;
        Ok(path)
    }

    /// Makes a folder for `owner`, mode 0700.
    pub fn folder(&self, name: &str, owner: u32) -> Result<PathBuf> {
        let path = self.path().join(name);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        std::os::unix::fs::chown(&path, Some(owner), Some(owner))?;
        Ok(path)
    }

    /// Starts a program as root.
    pub fn start(&self, name: &str, program: &Path, args: &[String]) -> Result<Process> {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(args);
        self.spawn(name, command)
    }

    /// Starts a program as kube-apiserver is started: its uid, its pod's cgroup.
    pub fn start_in_pod(&self, name: &str, program: &Path, args: &[String]) -> Result<Process> {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.pod.cgroup.join("cgroup.procs"))
            .args(["setpriv", "--pdeathsig", "KILL", "--clear-groups"])
            .args(["--reuid", &KUBE_APISERVER_UID.to_string()])
            .args(["--regid", &KUBE_APISERVER_UID.to_string()])
            .arg(program)
            .args(args);
        self.spawn(name, command)
    }

    fn spawn(&self, name: &str, mut command: Command) -> Result<Process> {
        let log = self.path().join(format!("{name}.log"));
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Process {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Keeps the folder for a look, and says where it is.
    pub fn keep(self) -> PathBuf {
        TO_REMOVE.lock().expect("no panic holds it").clear();
        let Self { folder, pod } = self;
        drop(pod);
        folder.keep()
    }
}

impl Process {
    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// SIGKILL, and wait.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and wait for an orderly end; SIGKILL after `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<Duration> {
        let began = std::time::Instant::now();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), Signal::SIGTERM)?;
        while began.elapsed() < limit {
            if self.child.try_wait()?.is_some() {
                return Ok(began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill();
        bail!(
            "{} did not end within {} s of SIGTERM",
            self.name,
            limit.as_secs()
        )
    }

    /// An error with the end of its log, if it has ended.
    pub fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!(
                "{} ended ({status}); its log ends:\n{}",
                self.name,
                self.log_end(15)
            ),
        }
    }

    /// The last lines of its log.
    pub fn log_end(&self, lines: usize) -> String {
        let text = self.log();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Its whole log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Pod {
    fn make() -> Result<Self> {
        // A static pod's UID is an MD5 in hex: 32 digits, no dashes.
        let uid = random_hex(16)?;
        let top = cgroup2_root()?
            .join("kubepods/burstable")
            .join(format!("pod{uid}"));
        let cgroup = top.join("kube-apiserver");
        fs::create_dir_all(&cgroup)
            .with_context(|| format!("cannot make the cgroup {}", cgroup.display()))?;
        let log = PathBuf::from(format!(
            "/var/log/pods/kube-system_kube-apiserver-node_{uid}"
        ));
        fs::create_dir_all(&log)?;
        Ok(Self { cgroup, top, log })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        empty(&self.cgroup);
        // rmdir: of the pods' folder only if it is empty, and so ours.
        let _ = fs::remove_dir(&self.log);
        let _ = self.log.parent().map(fs::remove_dir);
        // kubepods and burstable may be another run's too; rmdir leaves what is not empty.
        let parents = [Some(&*self.cgroup), Some(&*self.top), self.top.parent()];
        for cgroup in parents
            .into_iter()
            .flatten()
            .chain(self.top.parent().and_then(Path::parent))
        {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

/// Kills everything in a cgroup and waits until it is empty.
fn empty(cgroup: &Path) {
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    for _ in 0..100 {
        match fs::read_to_string(cgroup.join("cgroup.procs")) {
            Ok(procs) if !procs.is_empty() => std::thread::sleep(Duration::from_millis(20)),
            _ => return,
        }
    }
}

fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .context("no cgroup2 file system is mounted")
}

/// `n` random bytes in hex.
pub fn random_hex(n: usize) -> Result<String> {
    use std::fmt::Write;
    use std::io::Read;
    let mut bytes = vec![0; n];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let mut hex = String::new();
    for byte in bytes {
        write!(hex, "{byte:02x}")?;
    }
    Ok(hex)
}

/// Runs a program to its end; its output, or an error with what it said.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    run_with(Command::new(program).args(args))
}

/// As [`run`], for a prepared command.
pub fn run_with(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!(
            "{} failed ({}): {}",
            command.get_program().to_string_lossy(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
