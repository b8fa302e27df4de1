//! What a token is made of: names, limits, where the PIN comes from, how the host is started.
//!
//! Values arrive here checked: the daemon's configuration does that, with file and line.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hsm_wire::secret::Secret;

/// One token and everything its host needs.
#[derive(Clone)]
pub struct Config {
    /// Name in logs, health and errors.
    pub name: String,
    /// PKCS#11 URI of the token.
    pub uri: String,
    /// Absolute path of the vendor's module.
    pub module: PathBuf,
    /// Session threads in the host, 1 to 64.
    pub sessions: u16,
    /// A vendor call that takes longer counts as stuck.
    pub call_timeout: Duration,
    /// Where the user PIN comes from; without it nobody logs in.
    pub pin: Option<Arc<dyn PinSource>>,
    /// Raised when the PIN was changed: a PIN that was refused is tried again only then.
    pub pin_generation: u32,
    /// Folders that hold the notes on refused PINs; all that exist or can be made are used.
    pub state_dirs: Vec<PathBuf>,
    /// How the host is started.
    pub launch: Launch,
}

/// Gives the PIN to each host that is started. Nobody else keeps a copy.
pub trait PinSource: Send + Sync {
    /// The PIN as it is now, else why it cannot be read.
    fn read(&self) -> Result<Secret, String>;
}

/// How the host is started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Launch {
    /// Path of `hsm-token`.
    pub program: PathBuf,
    /// The dynamic loader to start it with, where the system's does not fit the module.
    pub loader: Option<Loader>,
    /// Who the host becomes and what it sees; without it, the host keeps the daemon's view.
    pub isolation: Option<Isolation>,
    /// Its whole environment: nothing is inherited.
    pub env: Vec<(String, String)>,
}

/// A dynamic loader and where it looks for libraries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loader {
    /// Path of `ld-linux-….so.2`.
    pub ld_so: PathBuf,
    /// Folders, in the order of the search.
    pub library_path: Vec<PathBuf>,
}

/// Who the host becomes and what it sees beside the system's folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolation {
    /// Its uid, never 0.
    pub uid: u32,
    /// Its gid, never 0.
    pub gid: u32,
    /// Files and folders it may read.
    pub read_only: Vec<PathBuf>,
    /// Files and folders it may write.
    pub read_write: Vec<PathBuf>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("name", &self.name)
            .field("uri", &self.uri)
            .field("module", &self.module)
            .field("sessions", &self.sessions)
            .field("call_timeout", &self.call_timeout)
            .field("pin", &self.pin.as_ref().map(|_| "…"))
            .field("pin_generation", &self.pin_generation)
            .field("state_dirs", &self.state_dirs)
            .field("launch", &self.launch)
            .finish()
    }
}
