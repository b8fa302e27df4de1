//! hsmd: the node's daemon. Kubernetes KMS v2 over keys that never leave the HSM.
mod health;
mod keyring;
mod kms;
mod telemetry;
fn main() {}
