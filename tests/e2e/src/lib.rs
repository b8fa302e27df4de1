//! Real parts around the release binaries: a SoftHSM token, hsmd, etcd, kube-apiserver.
//!
//! The demo and the end-to-end tests are both written over this. Nothing here is faked and nothing is
//! allowed that a node would not allow: kube-apiserver runs as uid 65534 in a static pod's cgroup,
//! because that is what hsmd demands of it.
//!
//! | module | what it starts |
//! |---|---|
//! | [`workbench`] | the workbench: a folder, a cgroup, and everything gone at the end |
//! | [`softhsm`] | a token with a key-encryption key |
//! | [`place`] | a node's files: configuration, sockets |
//! | [`daemon`] | hsmd, and what it says of itself |
//! | [`cluster`] | etcd and kube-apiserver, and requests to both |
//! | [`stored`] | (reads what kube-apiserver stored) |
//! | [`story`] | the main job and three bad days, step by step |

pub mod cluster;
pub mod daemon;
pub mod place;
pub mod softhsm;
pub mod stored;
pub mod story;
pub mod workbench;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Uid and gid of kube-apiserver on a Talos node.
pub const KUBE_APISERVER_UID: u32 = 65534;
/// Uid and gid of hsm-token by default.
pub const HOST_UID: u32 = 64500;

/// A file that `hack/demo` or `hack/test` built, named by an environment variable.
pub fn part(variable: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable)
        .map(PathBuf::from)
        .with_context(|| {
            format!("{variable} is not set; run this through hack/test or hack/demo")
        })?;
    if !path.is_file() {
        bail!("{variable} names {}, which does not exist", path.display());
    }
    Ok(path)
}

/// Asks `question` ten times a second until it has an answer. Its last refusal is the error.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut question: impl FnMut() -> Result<T>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        match question() {
            Ok(answer) => return Ok(answer),
            Err(error) if began.elapsed() > limit => {
                return Err(error.context(format!("{what}: not within {} s", limit.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
