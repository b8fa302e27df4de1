//! Where a socket is, as configuration and command line write it.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// Owner of a path socket unless configuration says otherwise: kube-apiserver's user on Talos.
const DEFAULT_OWNER: u32 = 65534;
/// Mode of a path socket unless configuration says otherwise.
const DEFAULT_MODE: u32 = 0o600;
/// An abstract name fills `sun_path` behind its leading zero byte.
const ABSTRACT_NAME_LIMIT: usize = 107;

/// A place to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket file.
    Path {
        /// Absolute and without `.` or `..`.
        path: PathBuf,
        /// Permission bits; none for others.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// A name in the abstract namespace, without its leading zero byte.
    Abstract(String),
}

/// Why an endpoint cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Not a URI of ours.
    #[error("{0:?} is not unix:///PATH or unix:///@NAME")]
    NotAUnixUri(String),
    /// kube-apiserver reads the endpoint as a URI, so these would mean another place there.
    #[error(
        "{uri:?} contains {character:?}, which means something else in a URI; choose a name without it"
    )]
    SpecialCharacter {
        /// What was given.
        uri: String,
        /// The first such character.
        character: char,
    },
    /// Not a path that can be bound to.
    #[error("{} is not the absolute path of a file, without . and ..", .0.display())]
    Path(PathBuf),
    /// An abstract name that is too long or empty.
    #[error("abstract socket name {0:?} is empty, longer than 107 bytes, or contains a zero byte")]
    AbstractName(String),
    /// A mode that lets anybody in, or is none.
    #[error(
        "mode {0:04o} gives more than its owner and group access to the socket; use 0600 or 0660"
    )]
    Mode(u32),
}

impl Endpoint {
    /// A socket file with a given owner and mode.
    pub fn path(
        path: impl Into<PathBuf>,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Result<Self, EndpointError> {
        let path = path.into();
        let plain = path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let text = path.as_os_str().as_encoded_bytes();
        // `components` passes over `//`, `/./` and a trailing slash, which would make one socket
        // have several names.
        let canonical = path.components().collect::<PathBuf>().as_os_str().len() == text.len();
        if !(path.is_absolute()
            && plain
            && canonical
            && path.file_name().is_some()
            && !text.contains(&0))
        {
            return Err(EndpointError::Path(path));
        }
        if mode & !0o770 != 0 {
            return Err(EndpointError::Mode(mode));
        }
        Ok(Self::Path {
            path,
            mode,
            uid,
            gid,
        })
    }

    /// A name in the abstract namespace.
    pub fn abstract_name(name: impl Into<String>) -> Result<Self, EndpointError> {
        let name = name.into();
        if name.is_empty() || name.len() > ABSTRACT_NAME_LIMIT || name.contains('\0') {
            return Err(EndpointError::AbstractName(name));
        }
        Ok(Self::Abstract(name))
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let path = uri
            .strip_prefix("unix://")
            .filter(|path| path.starts_with('/'))
            .ok_or_else(|| EndpointError::NotAUnixUri(uri.to_owned()))?;
        if let Some(character) = path
            .chars()
            .find(|c| matches!(c, '%' | '?' | '#' | '\\') || c.is_whitespace() || c.is_control())
        {
            return Err(EndpointError::SpecialCharacter {
                uri: uri.to_owned(),
                character,
            });
        }
        match path.strip_prefix("/@") {
            Some(name) => Self::abstract_name(name),
            None => Self::path(Path::new(path), DEFAULT_MODE, DEFAULT_OWNER, DEFAULT_OWNER),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path { path, .. } => write!(f, "unix://{}", path.display()),
            Self::Abstract(name) => write!(f, "unix:///@{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_owned_by_kube_apiserver_unless_said_otherwise() {
        let endpoint: Endpoint = "unix:///run/hsm/kms.sock".parse().unwrap();
        assert_eq!(
            endpoint,
            Endpoint::path("/run/hsm/kms.sock", 0o600, 65534, 65534).unwrap()
        );
        assert_eq!(endpoint.to_string(), "unix:///run/hsm/kms.sock");
    }

    #[test]
    fn an_at_sign_makes_the_name_abstract_as_in_kube_apiserver() {
        let endpoint: Endpoint = "unix:///@hsm-kms".parse().unwrap();
        assert_eq!(endpoint, Endpoint::Abstract("hsm-kms".into()));
        assert_eq!(endpoint.to_string(), "unix:///@hsm-kms");
    }

    #[test]
    fn what_would_be_another_place_for_kube_apiserver_is_refused() {
        for uri in [
            "unix:///run/a%20b",
            "unix:///run/a?b",
            "unix:///run/a#b",
            "unix:///run/a b",
            "unix:///@a\nb",
        ] {
            assert!(
                matches!(
                    uri.parse::<Endpoint>(),
                    Err(EndpointError::SpecialCharacter { .. })
                ),
                "{uri}"
            );
        }
        for uri in [
            "",
            "/run/hsm.sock",
            "unix:run/a",
            "unix://run/a",
            "unix:/run/a",
            "tcp:///run/a",
            "@hsm",
        ] {
            assert!(
                matches!(uri.parse::<Endpoint>(), Err(EndpointError::NotAUnixUri(_))),
                "{uri}"
            );
        }
    }

    #[test]
    fn a_path_has_one_spelling() {
        for path in [
            "/",
            "/run/",
            "/run//a",
            "/run/./a",
            "/run/../a",
            "/run/a/..",
            "run/a",
            "",
        ] {
            assert!(Endpoint::path(path, 0o600, 0, 0).is_err(), "{path}");
        }
    }

    #[test]
    fn a_mode_for_everybody_is_refused() {
        for mode in [0o666, 0o602, 0o1600, 0o4600, 0o10600] {
            assert_eq!(
                Endpoint::path("/a", mode, 0, 0),
                Err(EndpointError::Mode(mode))
            );
        }
        assert!(Endpoint::path("/a", 0o660, 0, 0).is_ok());
    }

    #[test]
    fn an_abstract_name_fits_the_socket_address() {
        assert!(Endpoint::abstract_name("x".repeat(107)).is_ok());
        for name in [String::new(), "x".repeat(108), "a\0b".into()] {
            assert!(Endpoint::abstract_name(name).is_err());
        }
    }
}
