//! What of the machine the module may see: decided here, mounted in [`super::root`].
//!
//! Read-only: the system's folders as far as they exist, the module's own folder, the explicit
//! loader's folders, and what the configuration names. Never: the daemon's configuration and state,
//! the host's `/proc`, `/sys` and `/run`.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hsm_wire::fault::{Fault, FaultKind};

use super::step;
use crate::args::Isolation;

/// Folders of the system that a library may need; `/lib*` besides.
const SYSTEM: [&str; 6] = ["/bin", "/etc", "/opt", "/sbin", "/usr", "/lib"];
/// Files in `/etc` that often are links to elsewhere, and without which no HSM is found by its name.
const RESOLVER: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];
/// The daemon's own: configuration with PIN files, sockets, latch notes.
pub(crate) const DAEMON: [&str; 3] = ["/etc/hsm", "/run/hsm", "/var/lib/hsm"];
/// As the kernel's own limit on links in a path.
const MAX_LINKS: usize = 40;

/// Who may write there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nobody.
    ReadOnly,
    /// The module, as far as files' modes let its user.
    ReadWrite,
}

/// A file or folder of the host that is shown at the same place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    /// Without any symbolic link in it.
    pub(crate) path: PathBuf,
    pub(crate) access: Access,
    pub(crate) is_folder: bool,
}

/// Everything that is shown.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// The system's folders.
    pub(crate) system: Vec<Bind>,
    /// Folders in them that are covered with an empty one.
    pub(crate) masked: Vec<PathBuf>,
    /// The module's, the loader's and the configuration's, ancestors first.
    pub(crate) others: Vec<Bind>,
    /// Symbolic links that lead there: where they are, and what is in them.
    pub(crate) links: Vec<(PathBuf, PathBuf)>,
}

/// A path with its symbolic links followed.
#[derive(Debug)]
struct Resolved {
    path: PathBuf,
    links: Vec<(PathBuf, PathBuf)>,
    is_folder: bool,
}

impl View {
    /// Looks at the machine as it is now.
    pub(crate) fn new(
        isolation: &Isolation,
        module: &Path,
        loader: &[PathBuf],
    ) -> Result<Self, Fault> {
        let mut view = Self::default();
        for folder in system_folders()? {
            if let Some(resolved) = resolve_if_there(&folder, isolation.uid)? {
                let bind = view.take(resolved, Access::ReadOnly);
                if !view.shows(&bind.path) {
                    view.system.push(bind);
                }
            }
        }
        if let Some(resolved) = resolve_if_there(Path::new(DAEMON[0]), isolation.uid)?
            && resolved.is_folder
            && view.shows(&resolved.path)
        {
            view.masked.push(resolved.path);
        }
        for file in RESOLVER {
            if let Some(resolved) = resolve_if_there(Path::new(file), isolation.uid)? {
                let bind = view.take(resolved, Access::ReadOnly);
                if !view.shows(&bind.path) {
                    view.others.push(bind);
                }
            }
        }
        view.add_module(module, isolation.uid)?;
        for folder in loader {
            view.add_folder(folder, isolation.uid)?;
        }
        for (paths, access) in [
            (&isolation.read_only, Access::ReadOnly),
            (&isolation.read_write, Access::ReadWrite),
        ] {
            for path in paths {
                let resolved = resolve(path, isolation.uid).map_err(step(
                    "resolve",
                    format!("show `{}` to the module", path.display()),
                ))?;
                check_named(path, &resolved.path)?;
                let bind = view.take(resolved, access);
                // The configuration's word over our own guess.
                view.others.retain(|other| other.path != bind.path);
                view.others.push(bind);
            }
        }
        // An ancestor mounted later would cover what is below it.
        view.others
            .sort_by_key(|bind| bind.path.components().count());
        Ok(view)
    }

    /// Keeps the links, gives the place.
    fn take(&mut self, resolved: Resolved, access: Access) -> Bind {
        for link in resolved.links {
            if !self.links.contains(&link) {
                self.links.push(link);
            }
        }
        Bind {
            path: resolved.path,
            access,
            is_folder: resolved.is_folder,
        }
    }

    /// The module's folder, for the libraries beside it: where it was named and where it really is.
    fn add_module(&mut self, module: &Path, uid: u32) -> Result<(), Fault> {
        let resolved = resolve(module, uid).map_err(|error| {
            Fault::new(
                FaultKind::ModuleLoad,
                format!("the module `{}` cannot be used: {error}", module.display()),
            )
        })?;
        let named = module.parent().unwrap_or(Path::new("/"));
        let real = resolved.path.parent().unwrap_or(Path::new("/")).to_owned();
        // Its neighbours there are not its libraries.
        if is_private(&real) && !self.shows(&real) {
            let bind = self.take(resolved, Access::ReadOnly);
            self.others.push(bind);
            return Ok(());
        }
        self.take(resolved, Access::ReadOnly);
        self.add_folder(&real, uid)?;
        self.add_folder(named, uid)
    }

    fn add_folder(&mut self, folder: &Path, uid: u32) -> Result<(), Fault> {
        let Some(resolved) = resolve_if_there(folder, uid)? else {
            return Ok(());
        };
        let bind = self.take(resolved, Access::ReadOnly);
        if !self.shows(&bind.path) && !is_private(&bind.path) && !self.others.contains(&bind) {
            self.others.push(bind);
        }
        Ok(())
    }

    /// Is it in one of the system's folders, and not covered there?
    fn shows(&self, path: &Path) -> bool {
        self.system.iter().any(|bind| path.starts_with(&bind.path))
            && !self.masked.iter().any(|masked| path.starts_with(masked))
    }
}

/// A folder that holds more than a vendor's files: showing it for one file would show the rest.
fn is_private(folder: &Path) -> bool {
    const SHARED: [&str; 4] = ["/var/lib", "/var/log", "/var/run", "/var/tmp"];
    folder.components().count() < 3
        || SHARED.iter().any(|shared| folder == Path::new(shared))
        || DAEMON.iter().any(|own| folder.starts_with(own))
}

/// Errors for a path that must not be shown even if the configuration names it.
fn check_named(named: &Path, path: &Path) -> Result<(), Fault> {
    let refuse = |why: String| {
        Err(Fault::new(
            FaultKind::Isolation,
            format!("`{}` is not shown to the module: {why}", named.display()),
        ))
    };
    if path.starts_with("/proc") {
        return refuse("it has a /proc of its own".to_owned());
    }
    for own in DAEMON {
        if path != Path::new(own) && Path::new(own).starts_with(path) {
            return refuse(format!(
                "it would show {own} as well; name what is needed in it"
            ));
        }
    }
    Ok(())
}

fn system_folders() -> Result<Vec<PathBuf>, Fault> {
    let mut folders: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    let entries = fs::read_dir("/").map_err(step("readdir", "list `/`"))?;
    for entry in entries {
        let entry = entry.map_err(step("readdir", "list `/`"))?;
        let path = entry.path();
        if entry.file_name().as_bytes().starts_with(b"lib") && !folders.contains(&path) {
            folders.push(path);
        }
    }
    Ok(folders)
}

/// The folders in a loader's command line: its own, and those of `--library-path`.
pub(crate) fn loader_folders(command_line: &[&[u8]]) -> Vec<PathBuf> {
    let Some((loader, options)) = command_line.split_first() else {
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = Path::new(OsStr::from_bytes(loader))
        .parent()
        .map(Path::to_owned)
        .into_iter()
        .collect();
    let named = options
        .iter()
        .position(|option| *option == b"--library-path")
        .and_then(|at| options.get(at + 1));
    if let Some(list) = named {
        let split = list.split(|byte| matches!(byte, b':' | b';'));
        folders.extend(split.map(|folder| PathBuf::from(OsStr::from_bytes(folder))));
    }
    folders.retain(|folder| folder.is_absolute());
    folders
}

fn resolve_if_there(path: &Path, uid: u32) -> Result<Option<Resolved>, Fault> {
    match resolve(path, uid) {
        Ok(resolved) => Ok(Some(resolved)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(step(
            "resolve",
            format!("show `{}` to the module", path.display()),
        )(error)),
    }
}

/// Follows every symbolic link and remembers it. One that belongs to the module's user is refused:
/// a module that ran before could have left it to have something else shown.
fn resolve(path: &Path, uid: u32) -> io::Result<Resolved> {
    let mut left: VecDeque<OsString> = parts(path).collect();
    let mut done = PathBuf::from("/");
    let mut links = Vec::new();
    let mut is_folder = true;
    while let Some(part) = left.pop_front() {
        if part == ".." {
            done.pop();
            continue;
        }
        let here = done.join(&part);
        let metadata = fs::symlink_metadata(&here)?;
        if !metadata.is_symlink() {
            is_folder = metadata.is_dir();
            done = here;
            continue;
        }
        if metadata.uid() == uid {
            return Err(io::Error::other(format!(
                "the symbolic link `{}` belongs to the module's user",
                here.display()
            )));
        }
        if links.len() == MAX_LINKS {
            return Err(nix::errno::Errno::ELOOP.into());
        }
        let target = fs::read_link(&here)?;
        if target.is_absolute() {
            done = PathBuf::from("/");
        }
        for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
            left.push_front(part);
        }
        links.push((here, target));
    }
    Ok(Resolved {
        path: done,
        links,
        is_folder,
    })
}

/// The names in a path, `..` included.
fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        std::path::Component::Normal(name) => Some(name.to_owned()),
        std::path::Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn isolation(read_only: &[&Path], read_write: &[&Path]) -> Isolation {
        Isolation {
            uid: 64500,
            gid: 64500,
            read_only: read_only.iter().map(PathBuf::from).collect(),
            read_write: read_write.iter().map(PathBuf::from).collect(),
        }
    }

    #[test]
    fn links_are_followed_and_remembered() {
        let folder = tempfile::tempdir().expect("folder");
        let real = folder.path().canonicalize().expect("path");
        fs::create_dir(real.join("v2")).expect("folder");
        fs::write(real.join("v2/lib.so"), "").expect("file");
        symlink("v2", real.join("current")).expect("link");
        symlink(real.join("current/lib.so"), real.join("lib.so")).expect("link");
        let resolved = resolve(&real.join("lib.so"), 64500).expect("resolve");
        assert_eq!(resolved.path, real.join("v2/lib.so"));
        assert!(!resolved.is_folder);
        let places: Vec<_> = resolved.links.iter().map(|(at, _)| at.clone()).collect();
        assert_eq!(places, [real.join("lib.so"), real.join("current")]);
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let folder = tempfile::tempdir().expect("folder");
        symlink("b", folder.path().join("a")).expect("link");
        symlink("a", folder.path().join("b")).expect("link");
        assert!(resolve(&folder.path().join("a"), 64500).is_err());
    }

    #[test]
    fn a_link_of_the_modules_user_is_refused() {
        let folder = tempfile::tempdir().expect("folder");
        let link = folder.path().join("state");
        symlink("/etc", &link).expect("link");
        let own = fs::symlink_metadata(&link).expect("metadata").uid();
        assert!(resolve(&link, own).is_err());
        assert!(resolve(&link, own + 1).is_ok());
    }

    #[test]
    fn what_the_configuration_names_must_exist() {
        let missing = Path::new("/nonexistent/state");
        let fault = View::new(&isolation(&[], &[missing]), Path::new("/usr/bin/env"), &[])
            .expect_err("missing");
        assert_eq!(fault.kind, FaultKind::Isolation);
        assert!(fault.detail.contains("/nonexistent/state"), "{fault}");
    }

    #[test]
    fn a_missing_module_is_a_module_fault() {
        let fault =
            View::new(&isolation(&[], &[]), Path::new("/opt/none.so"), &[]).expect_err("missing");
        assert_eq!(fault.kind, FaultKind::ModuleLoad);
    }

    #[test]
    fn a_path_around_the_daemons_own_folders_is_refused() {
        for path in ["/", "/etc", "/run", "/proc/1", "/proc"] {
            let view = View::new(
                &isolation(&[Path::new(path)], &[]),
                Path::new("/usr/bin/env"),
                &[],
            );
            assert!(view.is_err(), "{path}");
        }
    }

    #[test]
    fn ancestors_are_mounted_before_what_is_below_them() {
        let folder = tempfile::tempdir().expect("folder");
        let inner = folder.path().join("a/b");
        fs::create_dir_all(&inner).expect("folder");
        let view = View::new(
            &isolation(&[&inner], &[folder.path()]),
            Path::new("/usr/bin/env"),
            &[],
        )
        .expect("view");
        let order: Vec<_> = view.others.iter().map(|bind| bind.access).collect();
        assert_eq!(order, [Access::ReadWrite, Access::ReadOnly]);
    }

    #[test]
    fn a_module_among_the_daemons_files_is_shown_alone() {
        assert!(is_private(Path::new("/etc/hsm")));
        assert!(is_private(Path::new("/var/lib/hsm/modules")));
        assert!(is_private(Path::new("/tmp")));
        assert!(is_private(Path::new("/")));
        assert!(!is_private(Path::new("/opt/vendor")));
        assert!(!is_private(Path::new("/usr/local/lib")));
    }

    #[test]
    fn a_loaders_folders_are_read_off_its_command_line() {
        let line: [&[u8]; 4] = [
            b"/opt/v/ld-linux-x86-64.so.2",
            b"--library-path",
            b"/opt/v:/opt/w",
            b"--argv0",
        ];
        let folders = loader_folders(&line);
        assert_eq!(folders, ["/opt/v", "/opt/v", "/opt/w"].map(PathBuf::from));
        assert!(loader_folders(&[]).is_empty());
    }
}
