//! Where a token's PIN is. The place is no secret; reading it is the daemon's business.

use std::path::{Path, PathBuf};

/// The place of a PIN. It never comes from the command line or the environment, which every process
/// of the same user can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file of its own.
    File(PinFile),
    /// A descriptor that the daemon was started with.
    Fd(PinFd),
    /// A file that the service manager placed.
    Credential(PinCredential),
}

/// A file that holds the PIN and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinFile {
    /// Absolute.
    pub path: PathBuf,
    /// For platforms that write every file 0644 into a folder that only root may enter (Talos).
    pub allow_world_readable: bool,
}

/// An inherited pipe or file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinFd {
    /// Its number.
    pub fd: u32,
}

/// A file in `$CREDENTIALS_DIRECTORY` (systemd's `LoadCredential=`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinCredential {
    /// A file's name, without any `/`.
    pub name: String,
}

impl Source {
    /// The file, where it is one with a known path.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(file) => Some(&file.path),
            Self::Fd(_) | Self::Credential(_) => None,
        }
    }
}
