//! The module's root folder: an empty tmpfs with what [`super::view`] shows bound into it.
//!
//! Mounts are made private first: a mount that the host makes later below a folder that we show must
//! not appear here, where nothing would make it read-only. Needs Linux 5.12 (`mount_setattr`), which
//! makes a folder read-only together with everything that is mounted below it.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use hsm_wire::fault::Fault;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot, pivot_root};

use super::step;
use super::view::{Access, Bind, View};

/// Where the host's root is while the new one is built.
const HOST: &str = "/.host";
/// Bytes that a module may leave in each of its tmpfs; memory of the node.
const SCRATCH: &str = "mode=1777,size=64m";
const SMALL: &str = "mode=0755,size=64k";

/// Replaces the process's root. On an error the process must end: it is somewhere in between.
pub(crate) fn enter(view: &View) -> Result<(), Fault> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|errno| step("mount", "make its mounts private")(errno.into()))?;
    // Folders made here must be passable for the module's user.
    umask(Mode::from_bits_truncate(0o022));
    pivot()?;
    kernel_folders()?;
    for bind in &view.system {
        show(bind)?;
    }
    for masked in &view.masked {
        tmpfs(masked, SMALL)?;
    }
    for bind in &view.others {
        show(bind)?;
    }
    for (at, target) in &view.links {
        link(at, target)?;
    }
    umount2(HOST, MntFlags::MNT_DETACH)
        .map_err(|errno| step("umount2", "let go of the host's root")(errno.into()))?;
    fs::remove_dir(HOST).map_err(step("rmdir", "let go of the host's root"))?;
    for made in view
        .masked
        .iter()
        .map(PathBuf::as_path)
        .chain([Path::new("/dev"), Path::new("/")])
    {
        let flags =
            MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
        mount(none, made, none, flags, none).map_err(|errno| {
            step("mount", format!("make its `{}` read-only", made.display()))(errno.into())
        })?;
    }
    umask(Mode::from_bits_truncate(0o077));
    Ok(())
}

/// An empty tmpfs becomes `/`, the host's root is below it at [`HOST`].
fn pivot() -> Result<(), Fault> {
    // Any folder does: what the tmpfs covers there is uncovered again by moving to it.
    let place = ["/tmp", "/run", "/mnt", "/var", "/dev", "/proc"]
        .into_iter()
        .find(|place| Path::new(place).is_dir())
        .unwrap_or("/tmp");
    tmpfs(Path::new(place), "mode=0755,size=1m")?;
    let failed = |function| step(function, "move to a root of its own");
    chdir(place).map_err(|errno| failed("chdir")(errno.into()))?;
    let old = &HOST[1..];
    fs::create_dir(old).map_err(failed("mkdir"))?;
    if pivot_root(".", old).is_err() {
        move_to_root(place)?;
    }
    chdir("/").map_err(|errno| failed("chdir")(errno.into()))
}

/// The same without pivot_root(2), which container runtimes' default filter refuses even to
/// CAP_SYS_ADMIN (containerd's, so on Talos), and the kernel where `/` is the initramfs.
///
/// The host's root stays mounted below the new one. No path leads there, and to unmount what covers
/// it takes a privilege that is given up before any vendor code runs. In a mount namespace that a
/// module makes for itself, in a user namespace of its own, the kernel locks the mounts it copies.
fn move_to_root(place: &str) -> Result<(), Fault> {
    let failed = |function| step(function, "move to a root of its own");
    let none = None::<&str>;
    let host = &HOST[1..];
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some("/"), host, none, flags, none).map_err(|errno| failed("mount")(errno.into()))?;
    // The copy has the tmpfs as well, over what may have to be shown.
    let covered = format!("{host}{place}");
    umount2(covered.as_str(), MntFlags::MNT_DETACH)
        .map_err(|errno| failed("umount2")(errno.into()))?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)
        .map_err(|errno| failed("mount")(errno.into()))?;
    chroot(".").map_err(|errno| failed("chroot")(errno.into()))
}

/// `/proc` of our own pid namespace, a few harmless devices, scratch space.
fn kernel_folders() -> Result<(), Fault> {
    make_folder(Path::new("/proc"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        flags,
        Some("hidepid=2"),
    )
    .map_err(|errno| step("mount", "mount a /proc of its own")(errno.into()))?;
    tmpfs(Path::new("/tmp"), SCRATCH)?;
    tmpfs(Path::new("/run"), SCRATCH)?;
    tmpfs(Path::new("/dev"), SMALL)?;
    tmpfs(Path::new("/dev/shm"), SCRATCH)?;
    for device in ["null", "zero", "full", "random", "urandom"] {
        let path = Path::new("/dev").join(device);
        bind(&path, false)?;
    }
    for (at, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        link(Path::new(at), Path::new(target))?;
    }
    Ok(())
}

/// Shows a file or folder of the host at its place.
fn show(what: &Bind) -> Result<(), Fault> {
    bind(&what.path, what.is_folder)?;
    let mut attributes = MOUNT_ATTR_NOSUID;
    // An HSM on the bus is a device: named by the configuration, it must work as one.
    if !what.path.starts_with("/dev") {
        attributes |= MOUNT_ATTR_NODEV;
    }
    if what.access == Access::ReadOnly {
        attributes |= MOUNT_ATTR_RDONLY;
    }
    set_attributes(&what.path, attributes).map_err(step(
        "mount_setattr",
        format!("restrict `{}`", what.path.display()),
    ))
}

/// Binds the host's `path` to the same place, with everything mounted below it.
fn bind(path: &Path, is_folder: bool) -> Result<(), Fault> {
    if is_folder {
        make_folder(path)?;
    } else {
        if let Some(parent) = path.parent() {
            make_folder(parent)?;
        }
        if fs::symlink_metadata(path).is_err() {
            fs::File::create_new(path).map_err(step(
                "open",
                format!("make a place for `{}`", path.display()),
            ))?;
        }
    }
    let source = Path::new(HOST).join(path.strip_prefix("/").unwrap_or(path));
    let none = None::<&str>;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(&source), path, none, flags, none).map_err(|errno| {
        step("mount", format!("show `{}` to the module", path.display()))(errno.into())
    })
}

fn tmpfs(at: &Path, options: &str) -> Result<(), Fault> {
    make_folder(at)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options)).map_err(|errno| {
        step("mount", format!("mount a tmpfs on `{}`", at.display()))(errno.into())
    })
}

fn make_folder(path: &Path) -> Result<(), Fault> {
    fs::create_dir_all(path).map_err(step(
        "mkdir",
        format!("make a place for `{}`", path.display()),
    ))
}

/// A symbolic link as on the host, unless what is shown already has it.
fn link(at: &Path, target: &Path) -> Result<(), Fault> {
    if fs::symlink_metadata(at).is_ok() {
        return Ok(());
    }
    if let Some(parent) = at.parent() {
        make_folder(parent)?;
    }
    symlink(target, at).map_err(step("symlink", format!("make the link `{}`", at.display())))
}

// linux/mount.h and linux/fcntl.h; neither nix nor libc has them.
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const AT_RECURSIVE: libc::c_uint = 0x8000;

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes on the mount at `path` and on every one below it.
fn set_attributes(path: &Path, attr_set: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = MountAttr {
        attr_set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: mount_setattr(2): a directory descriptor, a NUL-terminated path, flags, a pointer to a
    // mount_attr and its size. Both pointers live through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
