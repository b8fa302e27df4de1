//! inotify on everything that a path leads through: each folder, each link, and the file itself.
//!
//! The folders tell of names that come, go and change; the file's own watch tells of writes that
//! reach it under another name (Talos bind-mounts the file; a hard link does the same). A path is
//! followed anew whenever anything on it changed, so that folders may come late and be replaced.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::net::unix::pipe;

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;

/// A path changes while it is followed, or folders would have to be raced through for ever.
const MAX_ROUNDS: usize = 4;

/// What was heard, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Happened {
    /// By the file's own watch: written, or closed by one who could write.
    ToFile { closed: bool },
    /// By its folder, under its name.
    ToName { closed: bool },
    /// A name on the way came, went or changed; or events were lost.
    OnTheWay,
    /// Its owner, mode or times changed.
    Touched,
}

/// Watches along one path.
pub(super) struct Trail {
    inotify: Inotify,
    /// The same descriptor, to wait for and read from. Not `AsyncFd`, which takes `unsafe` to make;
    /// this one reads any descriptor and is named after pipes.
    events: pipe::Receiver,
    watches: HashMap<i32, (WatchDescriptor, Watched)>,
    /// The last attempt to follow the path failed somewhere.
    lost: bool,
}

enum Watched {
    File,
    Folder(Names),
}

/// The names in one folder that the path leads through.
#[derive(Default, PartialEq)]
struct Names {
    on_the_way: BTreeSet<OsString>,
    /// The file's name, if this is its folder.
    last: Option<OsString>,
}

impl Trail {
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let events = File::from(inotify.as_fd().try_clone_to_owned()?);
        Ok(Self {
            inotify,
            events: pipe::Receiver::from_file_unchecked(events)?,
            watches: HashMap::new(),
            lost: false,
        })
    }

    /// Is something on the way not watched, so that only looking will tell?
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Watches everything that the path leads through now.
    pub(super) fn follow(&mut self, file: &Path) {
        let mut folders = way(file);
        for _ in 0..MAX_ROUNDS {
            self.watch(file, &folders);
            // What changed before its watch was in place told nobody.
            let again = way(file);
            if again == folders {
                return;
            }
            folders = again;
        }
        self.lost = true;
    }

    fn watch(&mut self, file: &Path, folders: &BTreeMap<PathBuf, Names>) {
        let inotify = &self.inotify;
        let mut watches = HashMap::new();
        self.lost = false;
        for (folder, names) in folders {
            let mut mask = AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_MOVE
                | AddWatchFlags::IN_DELETE_SELF
                | AddWatchFlags::IN_MOVE_SELF
                | AddWatchFlags::IN_ONLYDIR;
            if names.last.is_some() {
                // Not in the folders above: /var/log and /tmp would wake us with every line.
                mask |= AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE;
            }
            let names = Names {
                on_the_way: names.on_the_way.clone(),
                last: names.last.clone(),
            };
            match inotify.add_watch(folder, mask) {
                Ok(watch) => _ = watches.insert(watch.as_raw(), (watch, Watched::Folder(names))),
                Err(_) => self.lost = true,
            }
        }
        let mask = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        match inotify.add_watch(file, mask) {
            Ok(watch) => {
                _ = watches
                    .entry(watch.as_raw())
                    .or_insert((watch, Watched::File))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(_) => self.lost = true,
        }
        for (number, (old, _)) in &self.watches {
            if !watches.contains_key(number) {
                // Fails if it went with its folder.
                let _ = inotify.rm_watch(*old);
            }
        }
        self.watches = watches;
    }

    /// Waits for something to happen. Loses nothing when dropped.
    pub(super) async fn read(&mut self) -> Vec<Happened> {
        loop {
            if self.events.readable().await.is_err() {
                // The runtime is shutting down.
                return std::future::pending().await;
            }
            if let Some(events) = self.read_now() {
                return events;
            }
        }
    }

    /// What has happened up to now, without waiting. `None`: nothing.
    pub(super) fn read_now(&mut self) -> Option<Vec<Happened>> {
        // Some forty events of usual length; the kernel gives whole ones only.
        let mut buffer = [0; 4096];
        // Nothing to read after all, or an interruption: wait for the next one.
        let filled = self.events.try_read(&mut buffer).ok()?;
        let events = heard(&buffer[..filled]);
        Some(events.filter_map(|event| self.translate(event)).collect())
    }

    fn translate(&self, event: Heard<'_>) -> Option<Happened> {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return Some(Happened::OnTheWay);
        }
        // An event of a watch that was dropped since is about somewhere else.
        match &self.watches.get(&event.watch)?.1 {
            Watched::File => Some(to_file(event.mask)),
            Watched::Folder(names) => to_folder(names, event.mask, event.name),
        }
    }
}

/// One event as inotify(7) lays it out.
struct Heard<'a> {
    watch: i32,
    mask: AddWatchFlags,
    name: Option<&'a OsStr>,
}

/// `struct inotify_event`: watch, mask, cookie, length of the name; then the name, padded with zeros.
fn heard(mut bytes: &[u8]) -> impl Iterator<Item = Heard<'_>> {
    std::iter::from_fn(move || {
        let (head, rest) = bytes.split_first_chunk::<16>()?;
        let number = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
        let length = u32::from_ne_bytes(number(12)) as usize;
        let (name, rest) = rest.split_at_checked(length)?;
        bytes = rest;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Heard {
            watch: i32::from_ne_bytes(number(0)),
            mask: AddWatchFlags::from_bits_truncate(u32::from_ne_bytes(number(4))),
            name: (!name.is_empty()).then(|| OsStr::from_bytes(name)),
        })
    })
}

fn to_file(mask: AddWatchFlags) -> Happened {
    if mask.contains(AddWatchFlags::IN_MODIFY) {
        Happened::ToFile { closed: false }
    } else if mask.contains(AddWatchFlags::IN_CLOSE_WRITE) {
        Happened::ToFile { closed: true }
    } else if mask.contains(AddWatchFlags::IN_ATTRIB) {
        Happened::Touched
    } else {
        Happened::OnTheWay
    }
}

fn to_folder(names: &Names, mask: AddWatchFlags, name: Option<&OsStr>) -> Option<Happened> {
    let Some(name) = name else {
        // About the folder itself.
        return Some(Happened::OnTheWay);
    };
    let is_last = names.last.as_deref() == Some(name);
    if mask.contains(AddWatchFlags::IN_MODIFY) {
        return is_last.then_some(Happened::ToName { closed: false });
    }
    if mask.contains(AddWatchFlags::IN_CLOSE_WRITE) {
        return is_last.then_some(Happened::ToName { closed: true });
    }
    (is_last || names.on_the_way.contains(name)).then_some(Happened::OnTheWay)
}

/// The folders that `file` leads through, links followed, as far as they exist; and in each the
/// names that matter.
fn way(file: &Path) -> BTreeMap<PathBuf, Names> {
    let mut folders: BTreeMap<PathBuf, Names> = BTreeMap::new();
    let mut ahead: Vec<OsString> = parts(file);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        if name == ".." {
            // Right, because no part of `at` is a link.
            at.pop();
            continue;
        }
        let next = at.join(&name);
        let kind = fs::symlink_metadata(&next).map(|found| found.file_type());
        let is_link = kind.as_ref().is_ok_and(fs::FileType::is_symlink);
        let names = folders.entry(at.clone()).or_default();
        if ahead.is_empty() && !is_link {
            names.last = Some(name);
            return folders;
        }
        names.on_the_way.insert(name);
        match kind {
            Ok(_) if is_link => {
                links += 1;
                let Ok(target) = fs::read_link(&next) else {
                    return folders;
                };
                if links > MAX_LINKS {
                    return folders;
                }
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                ahead.extend(parts(&target));
            }
            Ok(kind) if kind.is_dir() => at = next,
            _ => return folders,
        }
    }
    folders
}

/// The parts of a path, last first.
fn parts(path: &Path) -> Vec<OsString> {
    path.components()
        .rev()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}
