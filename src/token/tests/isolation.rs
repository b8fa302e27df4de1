//! What a module can see and do from inside: tried by one that tries.

mod support;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::Request;
use support::hostile::{Hostile, module};
use support::{Host, PATIENCE, SOFTHSM, SoftHsm, Start, open, open_module};

/// One test at a time: some make and remove `/etc/hsm`, and a host that is just being isolated fails
/// closed when that happens under its hands.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file in one of the daemon's own folders, readable for everybody, for as long as this lives.
struct Planted {
    path: PathBuf,
    /// Folders that were made for it, the innermost first.
    made: Vec<PathBuf>,
}

impl Planted {
    fn in_folder(folder: &str, name: &str) -> Self {
        let folder = Path::new(folder);
        let made = folder
            .ancestors()
            .take_while(|folder| !folder.exists())
            .map(Path::to_owned)
            .collect();
        fs::create_dir_all(folder).expect("folder");
        let path = folder.join(format!("test-{}-{name}", std::process::id()));
        fs::write(&path, "canary").expect("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("mode");
        Self { path, made }
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // As long as nobody else has put anything there.
        for folder in &self.made {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// What the module found, by what it looked at.
fn findings(hostile: &Hostile) -> HashMap<String, String> {
    hostile
        .report()
        .lines()
        .filter_map(|line| line.split_once(['=', ':']))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

#[test]
fn a_module_that_looks_around_finds_nothing_of_the_node() {
    let _alone = alone();
    look_around(None);
}

#[test]
fn nor_does_it_where_a_container_runtime_forbids_pivot_root() {
    let _alone = alone();
    look_around(Some(nix::libc::SYS_pivot_root));
}

fn look_around(forbidden: Option<i64>) {
    let hostile = Hostile::new();
    hostile.rules("load spy\n");
    let pin = Planted::in_folder("/etc/hsm", "pin");
    let latch = Planted::in_folder("/run/hsm", "latch");
    let state = Planted::in_folder("/var/lib/hsm", "latch");
    let overlay = Planted::in_folder("/system/overlays/hsm-test", "config");
    let place = tempfile::tempdir().expect("folder");
    let socket = place.path().join("client.sock");
    let _listener = UnixListener::bind(&socket).expect("socket");
    let hidden = [&pin, &latch, &state, &overlay];
    let files: Vec<String> = hidden
        .iter()
        .map(|planted| planted.path.display().to_string())
        .chain([
            format!("/proc/1/root{}", pin.path.display()),
            socket.display().to_string(),
        ])
        .collect();
    let mut start = hostile.start();
    start.forbidden = forbidden;
    start.env.extend([
        ("SPY_DAEMON".to_owned(), std::process::id().to_string()),
        ("SPY_FILES".to_owned(), files.join(":")),
        ("SPY_SOCKET".to_owned(), socket.display().to_string()),
        ("SPY_WRITE".to_owned(), module().display().to_string()),
    ]);
    let mut host = Host::open(&start, hostile.open_request());
    host.describe();
    let found = findings(&hostile);
    let is = |name: &str, expected: &str| {
        let value = found.get(name).map(String::as_str);
        assert_eq!(value, Some(expected), "{name} in\n{}", hostile.report());
    };

    is("end", "ok");
    // Other processes: none are visible, the daemon least of all.
    is("read daemon environ", "ENOENT");
    is("read through daemon root", "ENOENT");
    is("signal daemon", "ESRCH");
    is("trace daemon", "ESRCH");
    is("pid", "1");
    is("parent", "0");
    is("trace parent", "ESRCH");
    let processes = found["proc"]
        .split(' ')
        .filter(|name| name.parse::<u32>().is_ok())
        .count();
    assert_eq!(processes, 1, "{}", found["proc"]);

    // Files and sockets of the daemon and its clients.
    for file in &files {
        is(&format!("open {file}"), "ENOENT");
    }
    is("connect", "ENOENT");
    is("sys", "ENOENT");
    is("host root", "ENOENT");
    for name in found["root"].split(' ') {
        assert!(
            [
                "bin", "dev", "etc", "lib", "opt", "proc", "run", "sbin", "tmp", "usr"
            ]
            .iter()
            .any(|known| name.starts_with(known))
                || start
                    .args
                    .iter()
                    .any(|arg| arg.starts_with(&format!("/{name}/")))
                || module().starts_with(format!("/{name}")),
            "/{name} is shown"
        );
    }
    for name in found["dev"].split(' ') {
        let known = [
            "fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom", "zero",
        ];
        assert!(known.contains(&name), "/dev/{name} is shown");
    }

    // Privileges, and ways to get them.
    for attempt in [
        "setuid 0",
        "setgid 0",
        "mount",
        "remount root",
        "unmount mask",
        "mknod",
        "chroot",
    ] {
        is(attempt, "EPERM");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        is(set, "0000000000000000");
    }
    is("NoNewPrivs", "1");
    is("Uid", "64500\t64500\t64500\t64500");
    is("Gid", "64500\t64500\t64500\t64500");
    is("Groups", "");
    is("core", "0");

    // The kernel may let anybody make a user namespace; it must uncover nothing.
    if found["own namespace"] == "ok" {
        for attempt in ["unmount mask", "unmount /proc", "unmount /"] {
            is(&format!("inside it {attempt}"), "EINVAL");
        }
        is("inside it remount /usr", "EPERM");
        assert!(
            !found["inside it root"].contains("var"),
            "{}",
            hostile.report()
        );
    }
    for file in &files {
        is(&format!("inside it open {file}"), "ENOENT");
    }

    // What may be written to, and what may not.
    for attempt in ["write /", "write /etc", "write /dev"] {
        is(attempt, "EROFS");
    }
    for attempt in ["write /tmp", "write /dev/null", "read /dev/urandom"] {
        is(attempt, "ok");
    }
    // The standard three, the session socket, and the folder that is being listed.
    assert_eq!(found["descriptors"], "0 1 2 3 4");
}

#[test]
fn of_the_daemons_folder_only_what_is_named_is_shown() {
    let _alone = alone();
    let hostile = Hostile::new();
    hostile.rules("load spy\n");
    let named = Planted::in_folder("/etc/hsm", "vendor.conf");
    let other = Planted::in_folder("/etc/hsm", "secret");
    let mut start = hostile.start();
    start
        .args
        .extend(["--read-only".to_owned(), named.path.display().to_string()]);
    start.env.extend([
        (
            "SPY_FILES".to_owned(),
            format!("{}:{}", named.path.display(), other.path.display()),
        ),
        ("SPY_WRITE".to_owned(), named.path.display().to_string()),
    ]);
    // Only the mount is in the way.
    fs::set_permissions(&named.path, fs::Permissions::from_mode(0o666)).expect("mode");
    Host::open(&start, hostile.open_request());
    let found = findings(&hostile);
    assert_eq!(found[&format!("open {}", named.path.display())], "ok");
    assert_eq!(found[&format!("open {}", other.path.display())], "ENOENT");
    assert_eq!(found["write named file"], "EROFS");
}

#[test]
fn the_process_that_waits_outside_has_no_privilege_and_no_socket() {
    let _alone = alone();
    let token = SoftHsm::new();
    let host = Host::open(&Start::for_token(&token), open());
    let proc = PathBuf::from(format!("/proc/{}", host.child.id()));
    let status = fs::read_to_string(proc.join("status")).expect("status");
    for line in [
        "Uid:\t64500\t64500\t64500\t64500",
        "Gid:\t64500\t64500\t64500\t64500",
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Threads:\t1",
    ] {
        assert!(status.lines().any(|l| l == line), "{line} in\n{status}");
    }
    let mut open: Vec<PathBuf> = fs::read_dir(proc.join("fd"))
        .expect("fd")
        .map(|entry| fs::read_link(entry.expect("entry").path()).expect("link"))
        .collect();
    open.retain(|target| target.display().to_string().starts_with("socket:"));
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn a_socket_that_is_named_can_be_used() {
    let _alone = alone();
    // As smart-card and HSM daemons have: the network is not the only way to a token.
    let hostile = Hostile::new();
    hostile.rules("load spy\n");
    let place = tempfile::tempdir().expect("folder");
    let socket = place.path().join("vendor.sock");
    let _listener = UnixListener::bind(&socket).expect("socket");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).expect("mode");
    let mut start = hostile.start();
    let named = socket.display().to_string();
    start
        .args
        .extend(["--read-write".to_owned(), named.clone()]);
    start.env.push(("SPY_SOCKET".to_owned(), named));
    Host::open(&start, hostile.open_request());
    assert_eq!(findings(&hostile)["connect"], "ok");
}

/// The fault that Open ends in.
fn refused(start: &Start, module: impl AsRef<Path>) -> Fault {
    let mut host = Host::start(start);
    let fault = host
        .ask(&Request::Open(open_module(module)))
        .outcome
        .expect_err("no isolation");
    assert_eq!(host.wait(PATIENCE).code(), Some(1));
    fault
}

#[test]
fn a_path_that_is_not_there_is_named_and_nothing_is_loaded() {
    let _alone = alone();
    let hostile = Hostile::new();
    hostile.rules("load spy\n");
    let mut start = hostile.start();
    start
        .args
        .extend(["--read-write".to_owned(), "/nonexistent/state".to_owned()]);
    let fault = refused(&start, module());
    assert_eq!(fault.kind, FaultKind::Isolation);
    assert!(fault.detail.contains("`/nonexistent/state`"), "{fault}");
    assert_eq!(hostile.report(), "");
}

#[test]
fn without_the_privilege_to_isolate_nothing_is_loaded() {
    let _alone = alone();
    let hostile = Hostile::new();
    hostile.rules("load spy\n");
    let start = hostile.start();
    // A daemon whose container was not given what it takes.
    let wrapper = hostile.folder.path().join("wrapper");
    fs::write(
        &wrapper,
        format!(
            "#!/bin/sh\nexec /usr/bin/setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin {} \"$@\"\n",
            start.program.display()
        ),
    )
    .expect("wrapper");
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("mode");
    let start = Start {
        program: wrapper,
        env: start
            .env
            .into_iter()
            .chain([("PATH".to_owned(), "/usr/bin:/bin".to_owned())])
            .collect(),
        ..start
    };
    let fault = refused(&start, module());
    assert_eq!(fault.kind, FaultKind::Isolation);
    assert_eq!(fault.function, "unshare");
    assert!(fault.detail.contains("CAP_SYS_ADMIN"), "{fault}");
    assert_eq!(hostile.report(), "");
}

#[test]
fn a_module_behind_links_is_found_where_they_lead() {
    let _alone = alone();
    let token = SoftHsm::new();
    let folder = tempfile::tempdir().expect("folder");
    let version = folder.path().join("v2");
    fs::create_dir(&version).expect("folder");
    fs::copy(SOFTHSM, version.join("libsofthsm2.so.2")).expect("copy");
    symlink("libsofthsm2.so.2", version.join("libsofthsm2.so")).expect("link");
    symlink("v2", folder.path().join("current")).expect("link");
    let named = folder.path().join("current/libsofthsm2.so");
    let mut host = Host::open(&Start::for_token(&token), open_module(named));
    let key = host.key();
    host.probe(&key).expect("probe");
}

#[test]
fn state_in_a_folder_below_one_that_is_shown_can_be_written_to() {
    let _alone = alone();
    // As a vendor does that keeps its state beside its library.
    let token = SoftHsm::new();
    let vendor = tempfile::Builder::new()
        .prefix("hsm-token-vendor-")
        .tempdir_in("/opt")
        .expect("folder");
    fs::copy(SOFTHSM, vendor.path().join("libvendor.so")).expect("copy");
    let state = vendor.path().join("state");
    fs::create_dir(&state).expect("folder");
    for entry in fs::read_dir(token.tokens()).expect("tokens") {
        let entry = entry.expect("entry");
        let copied = Command::new("cp")
            .arg("-a")
            .arg(entry.path())
            .arg(&state)
            .status()
            .expect("cp");
        assert!(copied.success());
    }
    support::give_away(&state);
    let conf = vendor.path().join("vendor.conf");
    fs::write(
        &conf,
        format!(
            "directories.tokendir = {}\nobjectstore.backend = file\n",
            state.display()
        ),
    )
    .expect("conf");
    let env = vec![("SOFTHSM2_CONF".to_owned(), conf.display().to_string())];
    let start = Start::isolated(env, &[], &[&state]);
    let mut host = Host::open(&start, open_module(vendor.path().join("libvendor.so")));
    let key = host.key();
    host.probe(&key).expect("probe");
}

#[test]
fn it_runs_under_an_explicit_loader_with_the_modules_libraries_beside_it() {
    let _alone = alone();
    let token = SoftHsm::new();
    let vendor = tempfile::Builder::new()
        .prefix("hsm-token-loader-")
        .tempdir()
        .expect("folder");
    fs::set_permissions(vendor.path(), fs::Permissions::from_mode(0o755)).expect("mode");
    let loader = vendor.path().join("ld-linux-x86-64.so.2");
    fs::copy("/lib64/ld-linux-x86-64.so.2", &loader).expect("loader");
    for program in [env!("CARGO_BIN_EXE_hsm-token"), SOFTHSM] {
        let listed = Command::new("ldd").arg(program).output().expect("ldd");
        for library in String::from_utf8_lossy(&listed.stdout)
            .split_whitespace()
            .filter(|word| word.starts_with('/') && !word.contains("ld-linux"))
        {
            let name = Path::new(library).file_name().expect("name");
            fs::copy(library, vendor.path().join(name)).expect("library");
        }
    }
    fs::copy(SOFTHSM, vendor.path().join("libvendor.so")).expect("module");
    let start = Start {
        loader: vec![
            loader.display().to_string(),
            "--library-path".to_owned(),
            vendor.path().display().to_string(),
        ],
        ..Start::for_token(&token)
    };
    let module = vendor.path().join("libvendor.so");
    let mut host = Host::open(&start, open_module(&module));
    let key = host.key();
    host.probe(&key).expect("probe");

    // What the module is linked with came from that folder: without it there it is not found.
    for entry in fs::read_dir(vendor.path()).expect("folder") {
        let path = entry.expect("entry").path();
        if path.display().to_string().contains("libcrypto") {
            fs::rename(&path, vendor.path().join("elsewhere")).expect("rename");
        }
    }
    let mut host = Host::start(&start);
    let outcome = host.ask(&Request::Open(open_module(&module))).outcome;
    // The loader goes on to the system's folders, which a test machine has and Talos has not.
    if let Err(fault) = outcome {
        assert_eq!(fault.kind, FaultKind::ModuleLoad, "{fault}");
        assert!(fault.detail.contains("libcrypto"), "{fault}");
    }
}

#[test]
fn without_isolation_the_module_runs_as_the_caller() {
    let _alone = alone();
    let token = SoftHsm::new();
    let mut host = Host::open(&Start::plain(token.env()), open());
    let key = host.key();
    host.probe(&key).expect("probe");
}
