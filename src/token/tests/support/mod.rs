//! A SoftHSM token in a temporary folder, and the real hsm-token program at the other end of a
//! socketpair. Needs root (namespaces, another uid) and SoftHSM, OpenSC and a C compiler; what is
//! missing fails the test by name.
#![allow(dead_code, reason = "each test program uses its own part of this")]

mod host;
pub(crate) mod hostile;
pub(crate) mod manners;
mod softhsm;

use std::path::Path;
use std::time::Duration;

use hsm_wire::envelope::Wrap;
use hsm_wire::host::{KeyRef, LatchNote, Open, Request};
use hsm_wire::secret::Secret;

pub(crate) use host::{Host, Start};
pub(crate) use softhsm::{SoftHsm, give_away};

/// Debian's, also on Ubuntu.
pub(crate) const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
pub(crate) const LABEL: &str = "rciis-production";
pub(crate) const KEY_LABEL: &str = "k8s-secrets-kek";
pub(crate) const PIN: &str = "648219";
/// Far above what any request takes; a test that waits so long has found a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The module's user and group in tests.
pub(crate) const ID: u32 = 64500;

pub(crate) fn seal(key: &KeyRef, aad: &[u8], plaintext: &[u8]) -> Request {
    Request::Seal {
        key: key.clone(),
        wrap: Wrap::AES_GCM,
        aad: aad.to_vec(),
        plaintext: Secret::copy_of(plaintext),
    }
}

pub(crate) fn unseal(key: &KeyRef, aad: &[u8], sealed: &[u8], len: usize) -> Request {
    Request::Unseal {
        key: key.clone(),
        wrap: Wrap::AES_GCM,
        aad: aad.to_vec(),
        sealed: sealed.to_vec(),
        plaintext_len: u32::try_from(len).expect("length"),
    }
}

/// Open for the token of [`SoftHsm`].
pub(crate) fn open() -> Open {
    open_module(SOFTHSM)
}

pub(crate) fn open_module(module: impl AsRef<Path>) -> Open {
    Open {
        module: module.as_ref().display().to_string(),
        token: format!("pkcs11:token={LABEL}"),
        sessions: 4,
        pin: Some(Secret::copy_of(PIN.as_bytes())),
        pin_generation: 1,
        latched: Vec::new(),
    }
}

pub(crate) fn note(serial: &str, generation: u32) -> LatchNote {
    LatchNote {
        serial: serial.to_owned(),
        generation,
    }
}
