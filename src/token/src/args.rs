//! The command line, as the daemon writes it.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Component, PathBuf};

/// What a person sees who starts the program by hand.
pub(crate) const USAGE: &str = "\
usage: hsm-token --session-socket 3 --uid N --gid N [--read-only PATH]... [--read-write PATH]...
       hsm-token --session-socket 3 --no-isolation
       hsm-token --version

Hosts one PKCS#11 module for hsmd and hsmctl, which start it and hand it the session socket.

  --session-socket FD   the inherited SOCK_SEQPACKET socket
  --uid N, --gid N      run the module as this user and group, in namespaces of its own
  --read-only PATH      show this file or folder to the module as well
  --read-write PATH     show it and let the module write to it
  --no-isolation        run the module as the caller, with the caller's view of the machine
";

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// Host a module.
    Serve {
        /// The session socket.
        socket: RawFd,
        /// None with `--no-isolation`.
        isolation: Option<Isolation>,
    },
}

/// How the module is locked in.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Isolation {
    /// User, not 0.
    pub(crate) uid: u32,
    /// Group, not 0.
    pub(crate) gid: u32,
    /// Shown besides the system folders.
    pub(crate) read_only: Vec<PathBuf>,
    /// Shown and writable.
    pub(crate) read_write: Vec<PathBuf>,
}

/// Reads the arguments after the program's name. The error is a sentence for a person.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter();
    let mut socket = None;
    let mut no_isolation = false;
    let (mut uid, mut gid) = (None, None);
    let (mut read_only, mut read_write) = (Vec::new(), Vec::new());
    while let Some(argument) = arguments.next() {
        let name = argument.to_string_lossy().into_owned();
        let mut value = || arguments.next().ok_or(format!("`{name}` needs a value"));
        match &*name {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--no-isolation" => no_isolation = true,
            "--session-socket" => {
                let fd = number(&name, &value()?)?;
                socket = Some(
                    RawFd::try_from(fd)
                        .ok()
                        .filter(|fd| *fd > 2)
                        .ok_or(format!("`{fd}` is no descriptor for `{name}`; hsmd uses 3"))?,
                );
            }
            "--uid" => uid = Some(not_root(&name, &value()?)?),
            "--gid" => gid = Some(not_root(&name, &value()?)?),
            "--read-only" => read_only.push(absolute(&name, value()?)?),
            "--read-write" => read_write.push(absolute(&name, value()?)?),
            _ => return Err(format!("unknown argument `{name}`")),
        }
    }
    let socket = socket.ok_or("`--session-socket` is missing")?;
    let isolation = match (no_isolation, uid, gid) {
        (true, None, None) if read_only.is_empty() && read_write.is_empty() => None,
        (true, ..) => {
            return Err("`--no-isolation` goes with none of the other options".to_owned());
        }
        (false, Some(uid), Some(gid)) => Some(Isolation {
            uid,
            gid,
            read_only,
            read_write,
        }),
        (false, ..) => {
            return Err("`--uid` and `--gid` are both needed, or `--no-isolation`".to_owned());
        }
    };
    Ok(Command::Serve { socket, isolation })
}

fn number(name: &str, value: &OsString) -> Result<u32, String> {
    let text = value.to_string_lossy();
    text.parse()
        .map_err(|_| format!("`{text}` is no number for `{name}`"))
}

fn not_root(name: &str, value: &OsString) -> Result<u32, String> {
    match number(name, value)? {
        // u32::MAX means "leave it as it is" to setresuid(2).
        0 | u32::MAX => Err(format!(
            "`{name}` must not be 0: the module is not to run as root"
        )),
        id => Ok(id),
    }
}

fn absolute(name: &str, value: OsString) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain {
        Ok(path)
    } else {
        Err(format!(
            "`{}` is no absolute path without `..` for `{name}`",
            path.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_daemons_line_is_read_whole() {
        let line = "--session-socket 3 --uid 64500 --gid 64501 --read-only /a --read-write /b \
                    --read-only /c";
        assert_eq!(
            parsed(line),
            Ok(Command::Serve {
                socket: 3,
                isolation: Some(Isolation {
                    uid: 64500,
                    gid: 64501,
                    read_only: vec!["/a".into(), "/c".into()],
                    read_write: vec!["/b".into()],
                })
            })
        );
    }

    #[test]
    fn isolation_is_given_up_only_by_name() {
        assert!(parsed("--session-socket 3").is_err());
        assert!(parsed("--session-socket 3 --uid 64500").is_err());
        assert!(parsed("--session-socket 3 --no-isolation --uid 64500").is_err());
        assert!(parsed("--session-socket 3 --no-isolation").is_ok());
    }

    #[test]
    fn root_is_refused_as_the_modules_user() {
        assert!(parsed("--session-socket 3 --uid 0 --gid 64500").is_err());
        assert!(parsed("--session-socket 3 --uid 64500 --gid 4294967295").is_err());
    }

    #[test]
    fn paths_must_be_absolute_and_without_dots() {
        let with = |path: &str| {
            parsed(&format!(
                "--session-socket 3 --uid 1 --gid 1 --read-only {path}"
            ))
        };
        assert!(with("/opt/vendor").is_ok());
        assert!(with("opt").is_err());
        assert!(with("/opt/../etc").is_err());
    }
}
