//! The programs' parsers, within reach of the fuzz targets.
//!
//! hsmd and hsmctl are programs without a library, so their modules are mounted here by path, under the
//! names that they call each other by. One function per target hands them bytes.

#![allow(
    dead_code,
    unfulfilled_lint_expectations,
    unused_imports,
    reason = "the parsers are a part of what is mounted"
)]

#[path = "../../../src/agent/src"]
mod agent {
    pub(crate) mod keyring;
    pub(crate) mod kms;
    pub(crate) mod listen;
    pub(crate) mod peer;
}

// The two parsers that are private to their face are mounted once more, below a parent of ours.
#[path = "../../../src/agent/src/kms"]
mod kms_parts {
    use crate::agent::kms::API_VERSION;
    pub(crate) mod messages;
}
#[path = "../../../src/agent/src/peer"]
mod peer_parts {
    pub(crate) mod parse;
}

#[path = "../../../src/forge/src/kms"]
mod ctl_parts {
    #[path = "keys/http.rs"]
    pub(crate) mod http;
    #[path = "inspect/stored.rs"]
    pub(crate) mod stored;
}

use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body_util::Full;
use tonic::codec::{Codec, Streaming};

// The modules call each other `crate::NAME`.
use agent::{keyring, kms, listen, peer};
use kms_parts::messages::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, Incoming, KmsCodec,
    MAX_REQUEST_LEN, Outgoing, StatusRequest, StatusResponse,
};
use peer_parts::parse;

/// A configuration file; one that is accepted must be a legal step from itself.
pub fn configuration(bytes: &[u8]) {
    let Ok(text) = hsm_config::decode(Ok(bytes.to_vec()), "hsmd.yaml") else {
        return;
    };
    match hsm_config::parse(&text, "hsmd.yaml") {
        Ok(config) => assert!(hsm_config::plan::check(&config, &config).is_ok()),
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}

/// The address of a socket.
pub fn endpoint(text: &str) {
    if let Ok(endpoint) = text.parse::<hsm_config::Endpoint>() {
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
    }
}

/// What procfs and the kubelet's folders say of a peer.
pub fn peer_of(text: &str) {
    let _ = parse::pidfd_pid(text);
    let _ = parse::innermost_pid(text);
    let _ = parse::is_identity_uid_map(text);
    let cgroup = parse::unified_cgroup(text).unwrap_or(text);
    let _ = parse::is_outside_our_cgroup_namespace(cgroup);
    if let Ok(pod) = parse::static_pod(cgroup) {
        assert_eq!(pod.as_str().len(), 32);
        assert!(cgroup.contains(pod.as_str()));
        assert!(!pod.names_log_folder_of_kube_apiserver(text));
    }
}

/// What is said to come out of etcd. The same is found in it when it was copied as digits.
pub fn stored(bytes: &[u8]) {
    let found = ctl_parts::stored::find(bytes);
    if let Ok(stored) = found {
        let _ = hsm_wire::envelope::split(&stored.envelope);
        if bytes.starts_with(b"k8s:enc:kms:v2:") || bytes.starts_with(&hsm_wire::envelope::MAGIC) {
            let digits = hsm_wire::identity::hex(bytes);
            assert_eq!(ctl_parts::stored::find(digits.as_bytes()), Ok(stored));
        }
    }
}

/// An answer on the daemon's health socket.
pub fn health_answer(bytes: &[u8]) {
    if let Ok(body) = ctl_parts::http::body(bytes) {
        assert!(bytes.ends_with(body));
    }
}

/// A gRPC body with one of the three requests.
pub fn kms_request(body: &[u8]) {
    request::<StatusRequest, StatusResponse>(body);
    request::<EncryptRequest, EncryptResponse>(body);
    request::<DecryptRequest, DecryptResponse>(body);
}

fn request<I: Incoming, O: Outgoing>(body: &[u8]) {
    let decoder = KmsCodec::<I, O>::default().decoder();
    let body = Full::new(Bytes::copy_from_slice(body));
    let limit = Some(MAX_REQUEST_LEN);
    let mut stream = Streaming::new_request(decoder, body, None, limit);
    let mut context = Context::from_waker(Waker::noop());
    // The whole body is there, so nothing is ever waited for.
    while let Poll::Ready(Ok(Some(_))) = std::pin::pin!(stream.message()).poll(&mut context) {}
}
