//! The checked values that the daemon's parts work with. They know neither file nor format.

use std::path::PathBuf;

use hsm_wire::uri::Uri;

/// What a key may do, set by configuration only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Announced: opens, does not seal yet.
    Pending,
    /// Seals and opens.
    Active,
    /// Opens what it sealed before.
    Retired,
}

impl KeyState {
    /// As written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Retired => "retired",
        }
    }
}

/// A key as the configuration names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRule {
    /// Token and object attributes.
    pub uri: Uri,
    /// Grows with every activation; part of the `key_id`.
    pub epoch: u64,
    /// What it may do.
    pub state: KeyState,
    /// The operator said that a copy of the key exists elsewhere.
    pub backup_acknowledged: bool,
    /// The URI names an RSA private key and the operator wants it so: everything that opens an
    /// envelope then takes an asymmetric operation. True exactly where the URI says `type=private`.
    pub allow_rsa_oaep: bool,
}

/// Names under which envelopes were and are sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterNames {
    /// Seals and opens.
    pub own: String,
    /// Former names whose envelopes still open, or the next one before it is its own.
    pub accepted: Vec<String>,
}

/// Who is let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The users whose processes may connect; kube-apiserver is 65534 on Talos.
    pub uids: Vec<u32>,
    /// A procfs in which the peers can be seen: the host's.
    pub host_proc: PathBuf,
    /// Where the kubelet keeps the logs of its pods.
    pub pod_logs: PathBuf,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            uids: vec![65534],
            host_proc: "/proc".into(),
            pod_logs: "/var/log/pods".into(),
        }
    }
}

/// What Status says while the HSM is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenLost {
    /// A gRPC error: the API server stops writing within 3 minutes.
    #[default]
    FailClosed,
    /// The reason and the last key_id: the API server goes on writing under the seed it holds.
    Coast,
}
