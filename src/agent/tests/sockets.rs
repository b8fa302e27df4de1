//! Listening, tried with real sockets in real folders.
//!
//! Needs root: a test gives folders, files and processes to other users. Somebody who holds a name
//! is this program again, told by the environment what to be.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/listen/mod.rs"]
mod listen;
#[path = "sockets/parts.rs"]
mod parts;
#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/peer/mod.rs"]
mod peer;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{Backlog, listen as set_backlog};

use listen::{Endpoint, Listener, State};
use parts::{
    Actor, NOBODY, at, becomes, connect, eventually, folder, names, open, squatter_at, unique_name,
};

#[tokio::test]
async fn an_endpoint_answers_as_soon_as_it_is_opened() {
    let folder = folder();
    for endpoint in [
        at(&folder.path().join("s")),
        Endpoint::abstract_name(unique_name()).unwrap(),
    ] {
        let (listener, mut incoming) = open(endpoint.clone());
        let client = connect(&endpoint).unwrap();
        assert_eq!(*listener.state().borrow(), State::Listening);
        assert_eq!(listener.endpoint(), &endpoint);
        let connection = incoming.next().await.unwrap();
        drop(client);
        drop(connection);
    }
}

#[tokio::test]
async fn a_socket_has_its_mode_and_owner_and_is_alone_in_its_folder() {
    let folder = folder();
    // Nobody else's umask changes that.
    let path = folder.path().join("s");
    let _open = open(Endpoint::path(&path, 0o620, 1234, 5678).unwrap());
    let file = fs::symlink_metadata(&path).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(
        (file.mode() & 0o7777, file.uid(), file.gid()),
        (0o620, 1234, 5678)
    );
    assert_eq!(names(folder.path()), ["s"]);
}

#[tokio::test]
async fn a_folder_of_the_sockets_owner_serves() {
    let folder = folder();
    chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let path = folder.path().join("s");
    let (listener, _incoming) = open(at(&path));
    assert_eq!(*listener.state().borrow(), State::Listening);
    let file = fs::symlink_metadata(&path).unwrap();
    assert_eq!(
        (file.mode() & 0o7777, file.uid(), file.gid()),
        (0o600, NOBODY, NOBODY)
    );
    listener.close().await;
    assert!(names(folder.path()).is_empty());
}

#[tokio::test]
async fn a_folder_in_which_others_can_replace_the_socket_is_refused() {
    let folder = folder();
    let path = folder.path().join("s");
    for (owner, mode, refusal) in [
        (
            0,
            0o775,
            "has mode 0775: more than its owner could replace the socket",
        ),
        (
            NOBODY,
            0o702,
            "has mode 0702: more than its owner could replace the socket",
        ),
        (
            1000,
            0o700,
            "belongs to uid 1000, who could replace the socket",
        ),
    ] {
        chown(folder.path(), Some(owner), Some(owner)).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
        let (listener, _incoming) = open(at(&path));
        assert_failed(&listener, refusal);
        assert!(names(folder.path()).is_empty());
    }
    chown(folder.path(), Some(0), Some(0)).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let (listener, _incoming) = open(at(&path));
    assert_eq!(
        *listener.state().borrow(),
        State::Listening,
        "a sticky folder, where nobody can rename what is another's"
    );
}

#[tokio::test]
async fn a_folder_that_is_a_link_is_refused() {
    let folder = folder();
    fs::create_dir(folder.path().join("real")).unwrap();
    symlink("real", folder.path().join("link")).unwrap();
    let (listener, _incoming) = open(at(&folder.path().join("link/s")));
    assert_failed(&listener, "is a symbolic link to one");
    assert!(names(&folder.path().join("real")).is_empty());
}

#[tokio::test]
async fn a_folder_that_appears_later_is_used_then() {
    let folder = folder();
    let path = folder.path().join("audit/kube/s");
    let (listener, mut incoming) = open(at(&path));
    let mut state = listener.state();
    let parent = path.parent().unwrap().display().to_string();
    assert_eq!(
        *state.borrow(),
        State::Waiting {
            reason: format!("the folder {parent} does not exist yet")
        }
    );
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let since = Instant::now();
    becomes(&mut state, |state| *state == State::Listening).await;
    assert!(since.elapsed() < Duration::from_secs(1));
    let _client = UnixStream::connect(&path).unwrap();
    incoming.next().await.unwrap();
}

#[tokio::test]
async fn a_path_that_is_too_long_for_an_address_serves_under_a_shorter_one() {
    let folder = folder();
    let deep = folder.path().join("a".repeat(120)).join("b".repeat(120));
    fs::create_dir_all(&deep).unwrap();
    let (listener, mut incoming) = open(at(&deep.join("s")));
    assert_eq!(*listener.state().borrow(), State::Listening);
    let shorter = File::open(&deep).unwrap();
    let _client = UnixStream::connect(format!("/proc/self/fd/{}/s", shorter.as_raw_fd())).unwrap();
    incoming.next().await.unwrap();
}

#[tokio::test]
async fn a_stale_socket_is_replaced() {
    let folder = folder();
    let path = folder.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a crash leaves the file");
    let (listener, mut incoming) = open(at(&path));
    assert_eq!(*listener.state().borrow(), State::Listening);
    let _client = UnixStream::connect(&path).unwrap();
    incoming.next().await.unwrap();
}

#[tokio::test]
async fn what_is_no_socket_is_never_touched() {
    let folder = folder();
    let path = folder.path().join("s");
    let elsewhere = folder.path().join("elsewhere");
    let _other_daemon = UnixListener::bind(&elsewhere).unwrap();
    fs::write(&path, "precious").unwrap();
    let (listener, _incoming) = open(at(&path));
    let mut state = listener.state();
    assert_failed(
        &listener,
        &format!(
            "{} is a regular file; remove it or choose another path",
            path.display()
        ),
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

    fs::remove_file(&path).unwrap();
    symlink(&elsewhere, &path).unwrap();
    becomes(&mut state, |state| {
        state
            .reason()
            .is_some_and(|reason| reason.contains("is a symbolic link"))
    })
    .await;

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    becomes(&mut state, |state| {
        state
            .reason()
            .is_some_and(|reason| reason.contains("is a folder"))
    })
    .await;

    fs::remove_dir(&path).unwrap();
    becomes(&mut state, |state| *state == State::Listening).await;
    assert_eq!(names(folder.path()), ["elsewhere", "s"]);
}

#[tokio::test]
async fn who_holds_a_name_is_named_and_waited_for() {
    let folder = folder();
    for endpoint in [
        at(&folder.path().join("s")),
        Endpoint::abstract_name(unique_name()).unwrap(),
    ] {
        let squatter = squatter_at(&endpoint);
        let (listener, _incoming) = open(endpoint.clone());
        let mut state = listener.state();
        let State::Taken { holder } = state.borrow().clone() else {
            panic!("{:?}", state.borrow())
        };
        assert_eq!(holder.uid, Some(NOBODY));
        assert_eq!(holder.pid, Some(squatter.child.id() as i32));
        let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", squatter.child.id())).unwrap();
        assert_eq!(
            holder.cgroup.as_deref(),
            cgroups.lines().find_map(|line| line.strip_prefix("0::"))
        );
        assert!(
            holder
                .to_string()
                .contains("held by a process of uid 65534, pid "),
            "{holder}"
        );
        drop(squatter);
        becomes(&mut state, |state| *state == State::Listening).await;
        connect(&endpoint).unwrap();
    }
}

#[tokio::test]
async fn a_holder_that_cannot_be_asked_holds_nobody_up() {
    // Its backlog is full, and a blocking connect would wait for ever.
    let name = unique_name();
    let squatter =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    set_backlog(&squatter, Backlog::new(0).unwrap()).unwrap();
    let endpoint = Endpoint::abstract_name(name).unwrap();
    let _fills_it = connect(&endpoint).unwrap();
    let since = Instant::now();
    let (listener, _incoming) = open(endpoint);
    assert!(since.elapsed() < Duration::from_secs(1));
    assert_taken_by_somebody_unknown(&listener);

    // It has the name and does not listen.
    let name = unique_name();
    let address = nix::sys::socket::UnixAddr::new_abstract(name.as_bytes()).unwrap();
    let unlistening = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::empty(),
        None,
    )
    .unwrap();
    nix::sys::socket::bind(unlistening.as_raw_fd(), &address).unwrap();
    let (listener, _incoming) = open(Endpoint::abstract_name(name).unwrap());
    assert_taken_by_somebody_unknown(&listener);

    // It is a socket of another type.
    let folder = folder();
    let path = folder.path().join("s");
    let _datagrams = UnixDatagram::bind(&path).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    let (listener, _incoming) = open(at(&path));
    assert_taken_by_somebody_unknown(&listener);
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
}

#[test]
fn a_holder_is_an_alarm_once_however_long_it_stays() {
    let name = unique_name();
    let squatter =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    // Of its own, because what this process logs goes by whichever thread came to a line first.
    let mut daemon = Actor::start("alarmed", &format!("unix:///@{name}"));
    assert_eq!(daemon.hear(), "1 alarms");
    let alarm = daemon.hear();
    let pid = std::process::id();
    assert!(
        alarm.contains(&format!(
            "ALARM: the name is held by a process of uid 0, pid {pid}, cgroup "
        )),
        "{alarm}"
    );
    drop(squatter);
    assert_eq!(daemon.hear(), "1 alarms, then listening");
}

#[tokio::test]
async fn a_socket_that_is_removed_comes_back() {
    let folder = folder();
    let path = folder.path().join("s");
    let (_listener, mut incoming) = open(at(&path));
    fs::remove_file(&path).unwrap();
    eventually(|| path.exists()).await;
    let _client = UnixStream::connect(&path).unwrap();
    incoming.next().await.unwrap();
}

#[tokio::test]
async fn a_folder_that_is_moved_away_is_waited_for() {
    let folder = folder();
    let path = folder.path().join("kube/s");
    fs::create_dir(folder.path().join("kube")).unwrap();
    let (listener, _incoming) = open(at(&path));
    let mut state = listener.state();
    fs::rename(folder.path().join("kube"), folder.path().join("other")).unwrap();
    becomes(&mut state, |state| matches!(state, State::Waiting { .. })).await;
    fs::create_dir(folder.path().join("kube")).unwrap();
    becomes(&mut state, |state| *state == State::Listening).await;
    UnixStream::connect(&path).unwrap();
}

#[tokio::test]
async fn a_socket_that_is_replaced_by_another_is_an_alarm() {
    let folder = folder();
    let endpoint = at(&folder.path().join("s"));
    let (listener, _incoming) = open(endpoint.clone());
    let mut state = listener.state();
    fs::remove_file(folder.path().join("s")).unwrap();
    let squatter = squatter_at(&endpoint);
    becomes(
        &mut state,
        |state| matches!(state, State::Taken { holder } if holder.uid == Some(NOBODY)),
    )
    .await;
    drop(squatter);
    becomes(&mut state, |state| *state == State::Listening).await;
}

#[tokio::test]
async fn closing_removes_the_socket_and_keeps_its_connections() {
    let folder = folder();
    let path = folder.path().join("s");
    let (listener, mut incoming) = open(at(&path));
    let mut client = UnixStream::connect(&path).unwrap();
    let connection = incoming.next().await.unwrap();
    listener.close().await;
    assert!(names(folder.path()).is_empty());
    assert!(incoming.next().await.is_none());
    connection.stream.try_write(b"still here").unwrap();
    drop(connection);
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    assert_eq!(said, "still here");
}

#[tokio::test]
async fn closing_does_not_remove_what_is_another_s() {
    let folder = folder();
    let path = folder.path().join("s");
    let (listener, _incoming) = open(at(&path));
    fs::remove_file(&path).unwrap();
    fs::write(&path, "somebody else's").unwrap();
    listener.close().await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "somebody else's");
}

#[tokio::test]
async fn a_name_is_free_when_its_listener_was_closed_or_dropped() {
    let endpoint = Endpoint::abstract_name(unique_name()).unwrap();
    let (listener, incoming) = open(endpoint.clone());
    listener.close().await;
    assert!(connect(&endpoint).is_err());
    drop(incoming);
    let (listener, mut incoming) = open(endpoint.clone());
    drop(listener);
    assert!(incoming.next().await.is_none());
    assert!(connect(&endpoint).is_err());
}

#[tokio::test]
async fn a_new_listener_of_this_process_takes_the_place_of_the_old_without_a_gap() {
    let folder = folder();
    let path = folder.path().join("s");
    let (old, mut old_incoming) = open(at(&path));
    let _old_client = UnixStream::connect(&path).unwrap();
    old_incoming.next().await.unwrap();
    let (new, mut new_incoming) = open(Endpoint::path(&path, 0o660, NOBODY, 7).unwrap());
    assert_eq!(*new.state().borrow(), State::Listening);
    assert_eq!(fs::metadata(&path).unwrap().gid(), 7);
    let _client = UnixStream::connect(&path).unwrap();
    new_incoming.next().await.unwrap();

    // The old one does not take it back, and does not remove it.
    let mut state = old.state();
    becomes(&mut state, |state| {
        state
            .reason()
            .is_some_and(|reason| reason.contains("another listener of this daemon"))
    })
    .await;
    old.close().await;
    let _client = UnixStream::connect(&path).unwrap();
    new_incoming.next().await.unwrap();
    assert_eq!(*new.state().borrow(), State::Listening);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_until_others_end() {
    let folder = folder();
    let path = folder.path().join("s");
    let (_listener, mut incoming) = open(at(&path));
    let mut held = Vec::new();
    for _ in 0..64 {
        let client = UnixStream::connect(&path).unwrap();
        held.push((client, incoming.next().await.unwrap()));
    }
    let mut beyond = UnixStream::connect(&path).unwrap();
    let closed = tokio::task::spawn_blocking(move || beyond.read(&mut [0]))
        .await
        .unwrap();
    assert_eq!(closed.unwrap(), 0);
    held.pop();
    let _client = UnixStream::connect(&path).unwrap();
    incoming.next().await.unwrap();
}

#[test]
fn a_shortage_of_descriptors_passes() {
    let folder = folder();
    let endpoint = at(&folder.path().join("s"));
    let mut starved = Actor::start("starved", &endpoint.to_string());
    assert_eq!(starved.hear(), "starved");
    let _client = connect(&endpoint).unwrap();
    assert_eq!(starved.hear(), "cannot accept");
    assert_eq!(starved.hear(), "accepted");
}

#[tokio::test]
async fn what_a_predecessor_left_behind_is_removed_and_nothing_else() {
    let folder = folder();
    let left = |name: &str, owner: u32, age: u64| {
        let path = folder.path().join(name);
        fs::create_dir(&path).unwrap();
        drop(UnixListener::bind(path.join("s")).unwrap());
        chown(&path, Some(owner), Some(owner)).unwrap();
        File::open(&path)
            .unwrap()
            .set_modified(std::time::SystemTime::now() - Duration::from_secs(age))
            .unwrap();
    };
    left(".hsmd-0000000000000001", 0, 120);
    left(".hsmd-0000000000000002", 0, 5);
    left(".hsmd-0000000000000003", NOBODY, 120);
    left("other", 0, 120);
    symlink("other", folder.path().join(".hsmd-0000000000000004")).unwrap();
    let _open = open(at(&folder.path().join("s")));
    assert_eq!(
        names(folder.path()),
        [
            ".hsmd-0000000000000002",
            ".hsmd-0000000000000003",
            ".hsmd-0000000000000004",
            "other",
            "s"
        ]
    );
    assert!(folder.path().join("other/s").exists());
    assert!(folder.path().join(".hsmd-0000000000000003/s").exists());
}

#[test]
fn who_owns_the_folder_gets_no_socket_of_another_mode_by_swapping_ours() {
    let folder = folder();
    chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut swapper = Actor::start("swapper", &folder.path().display().to_string());
    assert_eq!(swapper.hear(), "swapping");
    let path = folder.path().join("sock");
    let endpoint = Endpoint::path(&path, 0o600, NOBODY, NOBODY).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (mut listening, mut noticed) = (0, 0);
    runtime.block_on(async {
        // Both are soon seen, unless the machine is busy.
        let deadline = Instant::now() + Duration::from_secs(60);
        while (listening == 0 || noticed == 0) && Instant::now() < deadline {
            let (listener, mut incoming) = open(endpoint.clone());
            let state = listener.state().borrow().clone();
            match state {
                State::Listening => {
                    listening += 1;
                    let file = fs::symlink_metadata(&path).unwrap();
                    assert!(file.file_type().is_socket());
                    assert_eq!(
                        (file.mode() & 0o7777, file.uid(), file.gid()),
                        (0o600, NOBODY, NOBODY)
                    );
                    let _client = UnixStream::connect(&path).unwrap();
                    incoming.next().await.unwrap();
                }
                State::Failed { .. } => noticed += 1,
                state => panic!("{state:?}"),
            }
            listener.close().await;
        }
    });
    drop(swapper);
    assert!(
        listening > 0 && noticed > 0,
        "listening {listening} times, swap noticed {noticed} times"
    );
    // Whatever the swapper put in our way is as it made it.
    for entry in fs::read_dir(folder.path()).unwrap().flatten() {
        let file = entry.metadata().unwrap();
        assert!(file.is_dir() || file.file_type().is_symlink(), "{entry:?}");
        assert!(
            file.uid() == NOBODY || file.mode() & 0o7777 == 0o700,
            "{entry:?}"
        );
    }
}

#[track_caller]
fn assert_failed(listener: &Listener, part: &str) {
    let state = listener.state().borrow().clone();
    assert!(
        matches!(&state, State::Failed { reason } if reason.contains(part)),
        "{state:?}"
    );
}

#[track_caller]
fn assert_taken_by_somebody_unknown(listener: &Listener) {
    let state = listener.state().borrow().clone();
    assert!(
        matches!(&state, State::Taken { holder } if holder.uid.is_none()),
        "{state:?}"
    );
}
