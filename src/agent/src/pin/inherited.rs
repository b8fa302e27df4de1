//! Descriptors that the daemon was started with, as the place of a PIN.
//!
//! **Expected flow:** [`adopt_inherited`] runs before anything else in `main`. It reopens each
//! inherited pipe and file through `/proc/self/fd`, closed on exec, and closes the original: no module
//! host can inherit it. The first [`read`] takes a descriptor's content to the end and keeps it in a
//! sealed memfd; each later one reads that.
//!
//! **Why so:** a number from a configuration file must never be taken for a descriptor that the
//! daemon itself opened since. What was inherited is known at the start only, from the missing
//! close-on-exec flag. Reopening needs no `unsafe`, which owning a bare number would.
//!
//! **Caveats:** sockets cannot be reopened, so a PIN cannot come through one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hsm_wire::secret::Secret;
use nix::fcntl::{FcntlArg, OFlag, SealFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::memfd::MFdFlags;
use zeroize::Zeroizing;

use super::{MAX_BYTES, cleaned};

/// Whoever starts the daemon writes the PIN at once; the caller is a token that wants to log in.
const PATIENCE: Duration = Duration::from_secs(2);

static INHERITED: Inherited = Inherited(Mutex::new(BTreeMap::new()));

struct Inherited(Mutex<BTreeMap<u32, Content>>);

enum Content {
    /// Not read to its end yet, with what came so far.
    Open(File, Zeroizing<Vec<u8>>),
    /// A memfd that nobody can change any more.
    Sealed(File),
    /// Why nothing can come of it.
    Useless(String),
}

/// Takes over every pipe and file that the process was started with. Call it first of all.
pub(crate) fn adopt_inherited() {
    INHERITED.adopt(3..=u32::MAX);
}

/// The PIN that came through this descriptor.
pub(super) fn read(fd: u32) -> Result<Secret, String> {
    INHERITED.read(fd)
}

impl Inherited {
    fn adopt(&self, wanted: impl std::ops::RangeBounds<u32>) {
        // Without /proc nothing can be adopted, and reading says that the descriptor was not there.
        let Ok(folder) = fs::read_dir("/proc/self/fd") else {
            return;
        };
        let numbers: Vec<u32> = folder
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|fd| wanted.contains(fd))
            .collect();
        let mut contents = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for fd in numbers {
            if let Some(content) = adopt_one(fd) {
                contents.insert(fd, content);
            }
        }
    }

    fn read(&self, fd: u32) -> Result<Secret, String> {
        let mut contents = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let content = contents
            .get_mut(&fd)
            .ok_or_else(|| format!("fd {fd} was not open when the daemon was started"))?;
        if let Content::Open(file, so_far) = content {
            read_to_end(file, so_far, Instant::now() + PATIENCE)
                .map_err(|problem| format!("fd {fd} {problem}"))?;
            *content = match cleaned(Secret::copy_of(so_far)) {
                Ok(pin) => Content::Sealed(
                    sealed(&pin).map_err(|error| format!("fd {fd} cannot be kept: {error}"))?,
                ),
                Err(problem) => Content::Useless(problem),
            };
        }
        match content {
            Content::Sealed(memfd) => {
                unsealed(memfd).map_err(|error| format!("fd {fd} cannot be read again: {error}"))
            }
            Content::Useless(problem) => Err(format!("fd {fd} {problem}")),
            // Replaced just above.
            Content::Open(..) => Err(format!("fd {fd} is still being read")),
        }
    }
}

/// `None`: not inherited, or not something to read from, and left as it is.
fn adopt_one(fd: u32) -> Option<Content> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok())
        .map(OFlag::from_bits_retain)?;
    // Whatever this process opened has the flag; what it was started with cannot have it.
    if flags.contains(OFlag::O_CLOEXEC) {
        return None;
    }
    let link = format!("/proc/self/fd/{fd}");
    let kind = fs::metadata(&link).ok()?.file_type();
    let access = flags & OFlag::O_ACCMODE;
    let readable = match access {
        OFlag::O_RDONLY => kind.is_file() || kind.is_fifo(),
        // A pipe's end for writing is somebody's way to see that we live.
        OFlag::O_RDWR => kind.is_file(),
        _ => false,
    };
    if !readable {
        return Some(Content::Useless(
            "is neither a file nor the reading end of a pipe".to_owned(),
        ));
    }
    let reopened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).bits())
        .open(&link);
    Some(match reopened {
        Ok(file) => {
            // Inherited, so nobody else in this process owns the number.
            let _ = nix::unistd::close(fd as i32);
            Content::Open(file, Zeroizing::new(Vec::with_capacity(MAX_BYTES + 3)))
        }
        Err(error) => Content::Useless(format!("cannot be opened again: {error}")),
    })
}

/// Appends to `so_far`, which never grows beyond its first capacity: no copies are left behind.
fn read_to_end(file: &File, so_far: &mut Vec<u8>, deadline: Instant) -> Result<(), String> {
    let mut chunk = Zeroizing::new([0_u8; 256]);
    loop {
        let room = (MAX_BYTES + 3 - so_far.len()).min(chunk.len());
        if room == 0 {
            // More than a PIN; `cleaned` says so.
            return Ok(());
        }
        match io::Read::read(&mut &*file, &mut chunk[..room]) {
            Ok(0) => return Ok(()),
            Ok(count) => so_far.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(file, deadline)?,
            Err(error) => return Err(format!("cannot be read: {error}")),
        }
    }
}

fn wait(file: &File, deadline: Instant) -> Result<(), String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    match nix::poll::poll(&mut polled, timeout) {
        Ok(0) => Err(format!(
            "was not closed by its writer within {} s; the PIN is read up to the end",
            PATIENCE.as_secs()
        )),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(format!("cannot be waited for: {error}")),
    }
}

fn sealed(pin: &Secret) -> io::Result<File> {
    let memfd: OwnedFd = nix::sys::memfd::memfd_create(
        c"hsmd-pin",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?;
    let memfd = File::from(memfd);
    memfd.write_all_at(pin.expose(), 0)?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    nix::fcntl::fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memfd)
}

fn unsealed(memfd: &File) -> io::Result<Secret> {
    let length = usize::try_from(memfd.metadata()?.len()).unwrap_or(usize::MAX);
    let mut pin = Zeroizing::new(vec![0; length.min(MAX_BYTES)]);
    memfd.read_exact_at(&mut pin, 0)?;
    Ok(Secret::copy_of(&pin))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    fn registry() -> Inherited {
        Inherited(Mutex::new(BTreeMap::new()))
    }

    /// A pipe as a parent would leave it: the reading end without close-on-exec, owned by nobody.
    fn inherited_pipe() -> (u32, File) {
        let (reading, writing) = nix::unistd::pipe().unwrap();
        let number = reading.into_raw_fd() as u32;
        nix::fcntl::fcntl(&writing, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).unwrap();
        (number, File::from(writing))
    }

    #[test]
    fn a_pipe_is_read_once_and_its_pin_again_and_again() {
        let (fd, mut writer) = inherited_pipe();
        let registry = registry();
        registry.adopt(fd..=fd);
        // The number is free again: no child can inherit it.
        assert!(fs::read_link(format!("/proc/self/fd/{fd}")).is_err());
        writer.write_all(b"1234\n").unwrap();
        drop(writer);
        for _ in 0..3 {
            assert_eq!(registry.read(fd).unwrap().expose(), b"1234");
        }
    }

    #[test]
    fn a_writer_that_keeps_the_pipe_open_costs_two_seconds_and_no_content() {
        let (fd, mut writer) = inherited_pipe();
        let registry = registry();
        registry.adopt(fd..=fd);
        writer.write_all(b"12").unwrap();
        let start = Instant::now();
        let error = registry.read(fd).unwrap_err();
        assert!(error.contains("not closed by its writer"), "{error}");
        assert!(start.elapsed() < PATIENCE + Duration::from_secs(1));
        writer.write_all(b"34").unwrap();
        drop(writer);
        assert_eq!(registry.read(fd).unwrap().expose(), b"1234");
    }

    #[test]
    fn the_kept_pin_is_sealed_and_closed_on_exec() {
        let memfd = sealed(&Secret::copy_of(b"1234")).unwrap();
        assert!(memfd.write_at(b"9", 0).is_err());
        assert!(memfd.set_len(0).is_err());
        let flags = nix::fcntl::fcntl(&memfd, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::fcntl::FdFlag::FD_CLOEXEC.bits());
        assert_eq!(unsealed(&memfd).unwrap().expose(), b"1234");
    }

    #[test]
    fn an_own_descriptor_is_never_taken_for_an_inherited_one() {
        let own = tempfile::tempfile().unwrap();
        let fd = own.as_raw_fd() as u32;
        let registry = registry();
        registry.adopt(fd..=fd);
        assert!(
            registry
                .read(fd)
                .unwrap_err()
                .contains("was not open when the daemon was started")
        );
        own.set_len(1).unwrap();
    }

    #[test]
    fn an_empty_or_over_long_content_is_an_error_that_stays() {
        for (content, word) in [(vec![], "empty"), (vec![b'7'; 4096], "more than 1024")] {
            let (fd, mut writer) = inherited_pipe();
            let registry = registry();
            registry.adopt(fd..=fd);
            writer.write_all(&content).unwrap();
            drop(writer);
            for _ in 0..2 {
                let error = registry.read(fd).unwrap_err();
                assert!(error.contains(word) && !error.contains("777"), "{error}");
            }
        }
    }

    #[test]
    fn the_writing_end_of_a_pipe_is_left_alone() {
        let (reading, writing) = nix::unistd::pipe().unwrap();
        let fd = writing.into_raw_fd() as u32;
        let registry = registry();
        registry.adopt(fd..=fd);
        assert!(fs::read_link(format!("/proc/self/fd/{fd}")).is_ok());
        assert!(registry.read(fd).unwrap_err().contains("reading end"));
        nix::unistd::close(fd as i32).unwrap();
        drop(reading);
    }
}
