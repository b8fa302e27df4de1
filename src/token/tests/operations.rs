//! Open, Describe, Seal, Unseal and Probe on a SoftHSM token, as the daemon asks for them.

mod support;

use std::collections::HashSet;
use std::time::Instant;

use hsm_wire::envelope::Wrap;
use hsm_wire::fault::FaultKind;
use hsm_wire::host::{Answer, KeyRef, Open, Request};
use support::{Host, KEY_LABEL, PATIENCE, SoftHsm, Start, note, open, seal, unseal};

fn host(token: &SoftHsm) -> Host {
    Host::open(&Start::for_token(token), open())
}

#[test]
fn a_sealed_seed_opens_again_and_every_length_does() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    for len in [1, 15, 16, 17, 31, 32, 33, 48, 64, 100, 511, 512] {
        let plaintext: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let sealed = host.seal(&key, b"header", &plaintext).expect("seal");
        assert_eq!(sealed.len(), 12 + len + 16);
        let back = host.unseal(&key, b"header", &sealed, len).expect("unseal");
        assert_eq!(back, plaintext);
    }
    host.probe(&key).expect("probe");
}
