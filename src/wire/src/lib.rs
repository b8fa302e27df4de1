//! The bytes that daemon, module host and kube-apiserver exchange.
//!
//! Everything here is a pure function of its arguments: **no I/O, no clock, no randomness**. That
//! is what lets each parser be fuzzed and each format be pinned by golden bytes.
//!
//! | module | what it fixes |
//! |---|---|
//! | [`envelope`] | what kube-apiserver stores for us in etcd, for as long as the cluster lives |
//! | [`identity`] | fingerprint of a key, tag of a cluster, `key_id` |
//! | [`host`] | requests and responses between daemon and module host |
//! | [`fault`] | what can go wrong behind the PKCS#11 boundary, and what may be done about it |
//! | [`uri`] | PKCS#11 URIs (RFC 7512) that name tokens and keys |
//! | [`secret`] | bytes that are wiped when dropped and never printed |

pub mod cursor;
pub mod envelope;
pub mod fault;
pub mod host;
pub mod identity;
pub mod secret;
pub mod uri;
