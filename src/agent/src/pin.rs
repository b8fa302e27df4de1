//! Reading a token's PIN, where the configuration says it is.
//!
//! The PIN is read anew for each module host that starts, handed over, and forgotten: so a changed
//! file counts from the next start on, and a dump of the daemon's memory does not hold it. It never
//! comes from the command line or the environment, which every process of the same user can read.
//!
//! A wrong PIN is worse than none, because the token counts and then locks. So whatever looks like an
//! accident (an empty file, a second line, a control character) is an error before any login.
//!
//! **Invariant:** no error and no `Debug` here contains what was read.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use hsm_config::pin::Source;
use hsm_token_client::PinSource;
use hsm_wire::secret::Secret;
use nix::fcntl::OFlag;

mod inherited;

pub(crate) use inherited::adopt_inherited;

/// PKCS#11 sets no limit; no token takes more than 255 bytes.
const MAX_BYTES: usize = 1024;

/// Reads the PIN at the place that the configuration names.
pub(crate) struct Reader(pub(crate) Source);

impl PinSource for Reader {
    fn read(&self) -> Result<Secret, String> {
        match &self.0 {
            Source::File(file) => {
                let access = match file.allow_world_readable {
                    true => Access::Readable,
                    false => Access::Private,
                };
                read_file(&file.path, access)
            }
            Source::Fd(descriptor) => inherited::read(descriptor.fd),
            Source::Credential(credential) => {
                let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
                    format!(
                        "credential `{}`: CREDENTIALS_DIRECTORY is not set, so the daemon was started without credentials; add LoadCredential= to its unit",
                        credential.name
                    )
                })?;
                read_credential(Path::new(&folder), &credential.name)
            }
        }
    }
}

fn read_credential(folder: &Path, name: &str) -> Result<Secret, String> {
    read_file(&folder.join(name), Access::Credential)
}

/// Who else may read the file.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// Nobody.
    Private,
    /// The group bits show an access list's mask: systemd gives a unit's user access that way.
    Credential,
    /// Everybody, but only the owner writes.
    Readable,
}

impl Access {
    fn forbidden_bits(self) -> u32 {
        match self {
            Self::Private => 0o077,
            Self::Credential => 0o037,
            Self::Readable => 0o022,
        }
    }
}

fn read_file(path: &Path, access: Access) -> Result<Secret, String> {
    let shown = path.display();
    // Checked on the descriptor and not on the path: nobody can swap the file in between.
    // Non-blocking, or a pipe in the file's place would hold the caller until somebody writes.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(code) if code == nix::errno::Errno::ELOOP as i32 => {
                format!("{shown} is a symbolic link; name the file itself")
            }
            _ => format!("{shown} cannot be opened: {error}"),
        })?;
    let found = opened
        .metadata()
        .map_err(|error| format!("{shown} cannot be examined: {error}"))?;
    if !found.is_file() {
        return Err(format!("{shown} is {}, not a file", kind_of(&found)));
    }
    let own = nix::unistd::geteuid().as_raw();
    if found.uid() != 0 && found.uid() != own {
        return Err(format!(
            "{shown} belongs to uid {}, who could change it; run `chown {own} {shown}`",
            found.uid()
        ));
    }
    let mode = found.mode() & 0o7777;
    if mode & access.forbidden_bits() != 0 {
        let may = match mode & access.forbidden_bits() & 0o022 {
            0 => "read",
            _ => "write",
        };
        let fix = match access {
            Access::Readable => format!("run `chmod go-w {shown}`"),
            _ => format!("run `chmod 0600 {shown}`"),
        };
        return Err(format!(
            "{shown} has mode {mode:04o}, so others can {may} it; {fix}"
        ));
    }
    let read = read_limited(opened).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    cleaned(read).map_err(|problem| format!("{shown} {problem}"))
}

fn kind_of(found: &fs::Metadata) -> &'static str {
    let kind = found.file_type();
    if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// At most one byte more than a PIN may have, in a buffer that never moves and leaves no copies.
fn read_limited(mut from: impl Read) -> io::Result<Secret> {
    let mut buffer = zeroize::Zeroizing::new(vec![0; MAX_BYTES + 3]);
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Secret::copy_of(&buffer[..filled]))
}

/// What was read → the PIN: one line end is the editor's, anything else unexpected is an accident.
fn cleaned(read: Secret) -> Result<Secret, String> {
    let bytes = read.expose();
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    if bytes.is_empty() {
        return Err("is empty; it must hold the PIN".to_owned());
    }
    if bytes.len() > MAX_BYTES {
        return Err(format!(
            "holds more than {MAX_BYTES} bytes, which is no PIN"
        ));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| "is not UTF-8, which PKCS#11 wants a PIN to be".to_owned())?;
    if text.chars().any(char::is_control) {
        return Err("holds a line end or another control character inside; it must hold the PIN in one line and nothing else".to_owned());
    }
    Ok(Secret::copy_of(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use hsm_config::pin::PinFile;

    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, content: &[u8], mode: u32) -> PathBuf {
            let path = self.0.path().join("pin");
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    fn read(path: &Path) -> Result<Secret, String> {
        read_file(path, Access::Private)
    }

    #[test]
    fn a_private_file_gives_the_pin_without_its_line_end() {
        let folder = Folder::new();
        for content in [&b"12 34"[..], b"12 34\n", b"12 34\r\n"] {
            let pin = read(&folder.file(content, 0o600)).unwrap();
            assert_eq!(pin.expose(), b"12 34");
        }
        assert_eq!(read(&folder.file(b"1", 0o400)).unwrap().expose(), b"1");
    }

    #[test]
    fn what_looks_like_an_accident_is_no_pin_and_is_not_repeated() {
        let folder = Folder::new();
        let long = [b'7'; MAX_BYTES + 1];
        for (content, word) in [
            (&b""[..], "empty"),
            (b"\n", "empty"),
            (b"canary\n\n", "line end"),
            (b"# canary\ncanary", "line end"),
            (b"canary\0", "control"),
            (b"canary\xff", "UTF-8"),
            (&long, "more than 1024"),
        ] {
            let error = read(&folder.file(content, 0o600)).unwrap_err();
            assert!(error.contains(word), "{error}");
            assert!(
                !error.contains("canary") && !error.contains("777"),
                "{error}"
            );
        }
        let limit = [b'7'; MAX_BYTES];
        assert!(read(&folder.file(&limit, 0o600)).is_ok());
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_command_that_mends_it() {
        let folder = Folder::new();
        for mode in [0o640, 0o604, 0o644, 0o660, 0o610] {
            let path = folder.file(b"1234", mode);
            let error = read(&path).unwrap_err();
            assert!(
                error.contains(&format!("chmod 0600 {}", path.display())),
                "{error}"
            );
        }
    }

    #[test]
    fn a_world_readable_file_is_taken_where_allowed_but_never_a_writable_one() {
        let folder = Folder::new();
        let read = |mode| {
            let path = folder.file(b"1234", mode);
            Reader(Source::File(PinFile {
                path,
                allow_world_readable: true,
            }))
            .read()
        };
        assert!(read(0o644).is_ok());
        assert!(read(0o664).unwrap_err().contains("others can write it"));
        assert!(read(0o646).unwrap_err().contains("chmod go-w"));
    }

    #[test]
    fn a_link_a_pipe_and_a_folder_are_not_files() {
        let folder = Folder::new();
        let link = folder.0.path().join("link");
        symlink(folder.file(b"1234", 0o600), &link).unwrap();
        assert!(read(&link).unwrap_err().contains("symbolic link"));
        let pipe = folder.0.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(read(&pipe).unwrap_err().contains("a pipe, not a file"));
        assert!(
            read(folder.0.path())
                .unwrap_err()
                .contains("a folder, not a file")
        );
        assert!(
            read(&folder.0.path().join("no"))
                .unwrap_err()
                .contains("cannot be opened")
        );
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("only root can give a file away; not tested");
            return;
        }
        let folder = Folder::new();
        let path = folder.file(b"1234", 0o600);
        std::os::unix::fs::chown(&path, Some(64_500), None).unwrap();
        assert!(read(&path).unwrap_err().contains("belongs to uid 64500"));
    }

    #[test]
    fn a_credential_may_show_an_access_list_as_group_bits() {
        let folder = Folder::new();
        folder.file(b"1234", 0o440);
        let pin = read_credential(folder.0.path(), "pin").unwrap();
        assert_eq!(pin.expose(), b"1234");
        folder.file(b"1234", 0o444);
        assert!(read_credential(folder.0.path(), "pin").is_err());
    }
}
