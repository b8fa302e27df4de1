//! A token in memory, for the tests of the crates above: the real queue, deadlines and recovery of
//! [`Token`], and at the other end of the socketpair a task instead of a process.
//!
//! It seals with real AES-256-GCM and has the fingerprints that a token with these keys would have.
//! What can go wrong with a token is a switch here; switches act on the operations that begin, or
//! are held, after they were turned.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aes_gcm::aead::{Aead, Generate, Payload};
use aes_gcm::aes::Aes256;
use aes_gcm::aes::cipher::BlockCipherEncrypt;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce};
use hsm_wire::envelope::Wrap;
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{
    Answer, Description, KeyClass, KeyInfo, KeyRef, LatchNote, Open, Recovery, Request, Response,
    TokenInfo,
};
use hsm_wire::identity::{FINGERPRINT_BLOCK, Fingerprint, FingerprintMethod};
use hsm_wire::secret::Secret;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use crate::channel::{Buffer, Channel};
use crate::config::{Config, Launch};
use crate::host::Hosts;
use crate::token::Token;

const NONCE_LEN: usize = 12;

/// Serial number of every fake token.
pub const SERIAL: &str = "fake0000";

/// A key on a fake token.
#[derive(Clone)]
pub struct FakeKey {
    /// CKA_LABEL.
    pub label: String,
    /// CKA_ID.
    pub id: Vec<u8>,
    /// The AES-256 key itself: test data, never a real key.
    pub bytes: [u8; 32],
}

/// The token. Clones share it, and it may serve several [`Token`]s one after the other.
#[derive(Clone)]
pub struct Fake(Arc<Shared>);

struct Shared {
    counts: Mutex<Counts>,
    switches: watch::Sender<Switches>,
}

#[derive(Clone, Default)]
struct Switches {
    keys: Vec<FakeKey>,
    recovery: Recovery,
    start: Option<String>,
    open: Option<Fault>,
    operations: Option<Fault>,
    delay: Duration,
    held: bool,
    hang: bool,
    deaths: u64,
}

/// How often each request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Hosts that were started.
    pub hosts: u64,
    /// Open with a PIN: each would be a login.
    pub logins: u64,
    /// Describe.
    pub describes: u64,
    /// Seal.
    pub seals: u64,
    /// Unseal.
    pub unseals: u64,
    /// Probe.
    pub probes: u64,
}

impl FakeKey {
    /// A key with a label, its id made of the label's bytes, and all key bytes `fill`.
    pub fn new(label: &str, fill: u8) -> Self {
        Self {
            label: label.into(),
            id: label.into(),
            bytes: [fill; 32],
        }
    }

    /// How to ask for it.
    pub fn reference(&self) -> KeyRef {
        let mut block = FINGERPRINT_BLOCK.into();
        Aes256::new(&self.bytes.into()).encrypt_block(&mut block);
        KeyRef {
            id: self.id.clone(),
            label: self.label.clone(),
            fingerprint: Fingerprint::of_block_image(FingerprintMethod::Ecb, &block.into()),
        }
    }

    /// As the token describes it.
    pub fn info(&self) -> KeyInfo {
        KeyInfo {
            key: self.reference(),
            class: KeyClass::Secret,
            bits: 256,
            sensitive: true,
            extractable: false,
            never_extractable: true,
            wrap: Ok(Wrap::AES_GCM),
            passed_over: Vec::new(),
        }
    }

    fn seal(&self, aad: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, Fault> {
        let nonce = Nonce::generate();
        let sealed = Aes256Gcm::new(&self.bytes.into())
            .encrypt(
                &nonce,
                Payload {
                    msg: plaintext,
                    aad,
                },
            )
            .map_err(|_| Fault::new(FaultKind::Device, "the fake cannot encrypt this"))?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    fn unseal(&self, aad: &[u8], sealed: &[u8]) -> Result<Secret, Fault> {
        let tampered = || Fault::new(FaultKind::Tampered, "the sealed bytes do not authenticate");
        let (nonce, msg) = sealed
            .split_first_chunk::<NONCE_LEN>()
            .ok_or_else(tampered)?;
        Aes256Gcm::new(&self.bytes.into())
            .decrypt(&(*nonce).into(), Payload { msg, aad })
            .map(Secret::new)
            .map_err(|_| tampered())
    }
}

impl Fake {
    /// A token with these keys, that works.
    pub fn new(keys: impl IntoIterator<Item = FakeKey>) -> Self {
        let keys = keys.into_iter().collect();
        Self(Arc::new(Shared {
            counts: Mutex::default(),
            switches: watch::Sender::new(Switches {
                keys,
                ..Switches::default()
            }),
        }))
    }

    /// How often each request came in.
    pub fn counts(&self) -> Counts {
        *self.0.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the token has from now on; it is described anew by the next host only.
    pub fn set_keys(&self, keys: impl IntoIterator<Item = FakeKey>) {
        self.turn(|s| s.keys = keys.into_iter().collect());
    }

    /// No host can be started, for this reason.
    pub fn fail_start(&self, reason: Option<&str>) {
        self.turn(|s| s.start = reason.map(str::to_owned));
    }

    /// The token cannot be opened.
    pub fn fail_open(&self, fault: Option<Fault>) {
        self.turn(|s| s.open = fault);
    }

    /// Every Seal, Unseal and Probe has this outcome.
    pub fn fail_operations(&self, fault: Option<Fault>) {
        self.turn(|s| s.operations = fault);
    }

    /// Every Seal, Unseal and Probe takes this long.
    pub fn delay(&self, delay: Duration) {
        self.turn(|s| s.delay = delay);
    }

    /// Operations are taken and kept until [`Fake::release`].
    pub fn hold(&self) {
        self.turn(|s| s.held = true);
    }

    /// Lets the operations go that were held.
    pub fn release(&self) {
        self.turn(|s| s.held = false);
    }

    /// Operations that begin while it is on never end, each with a session; only another host
    /// helps.
    pub fn hang(&self, on: bool) {
        self.turn(|s| s.hang = on);
    }

    /// Answers say that the host took these steps of recovery.
    pub fn recover(&self, taken: Recovery) {
        self.turn(|s| s.recovery = taken);
    }

    /// The host that runs now ends, as a module that crashes ends it.
    pub fn die(&self) {
        self.turn(|s| s.deaths += 1);
    }

    fn turn(&self, switch: impl FnOnce(&mut Switches)) {
        self.0.switches.send_modify(switch);
    }

    fn count(&self, what: impl FnOnce(&mut Counts)) {
        what(&mut self.0.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A host of this token, at the other end of `channel`.
    pub(crate) fn start(&self, channel: OwnedFd) -> io::Result<FakeHost> {
        if let Some(reason) = &self.0.switches.borrow().start {
            return Err(io::Error::other(reason.clone()));
        }
        self.count(|c| c.hosts += 1);
        let channel = Arc::new(Channel::new(channel)?);
        let task = tokio::spawn(serve(self.clone(), channel));
        Ok(FakeHost { task, how: None })
    }
}

impl Token {
    /// A token with the default limits over a fake.
    pub fn start_with_fake(name: &str, fake: &Fake) -> Self {
        let config = Config {
            name: name.into(),
            uri: format!("pkcs11:token={name}"),
            module: "/fake".into(),
            sessions: 4,
            call_timeout: Duration::from_secs(2),
            pin: None,
            pin_generation: 1,
            state_dirs: Vec::new(),
            launch: Launch::default(),
        };
        Self::start_fake_as(config, fake)
    }

    /// The same with limits, PIN and state folders of the caller; nothing of `launch` is used.
    pub fn start_fake_as(config: Config, fake: &Fake) -> Self {
        Self::start_on(config, Hosts::Fakes(fake.clone()))
    }
}

/// A host that is a task.
pub(crate) struct FakeHost {
    task: JoinHandle<&'static str>,
    how: Option<&'static str>,
}

impl FakeHost {
    pub(crate) fn kill(&self) {
        self.task.abort();
    }

    pub(crate) async fn ended(&mut self) -> String {
        if self.how.is_none() {
            self.how = Some((&mut self.task).await.unwrap_or("was killed by SIGKILL"));
        }
        self.how.unwrap_or_default().to_owned()
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn serve(fake: Fake, channel: Arc<Channel>) -> &'static str {
    let mut switches = fake.0.switches.subscribe();
    let deaths = switches.borrow().deaths;
    let mut buffer = Buffer::new();
    let mut sessions = Arc::new(Semaphore::new(1));
    // Dropped with the host, which ends what hangs.
    let mut operations = JoinSet::new();
    loop {
        let packet = tokio::select! {
            _ = switches.wait_for(|s| s.deaths != deaths) => return "was killed by SIGSEGV",
            Some(_) = operations.join_next() => continue,
            packet = channel.recv(&mut buffer) => packet,
        };
        let Ok(Some(packet)) = packet else {
            return "ended with exit code 0";
        };
        let Ok((id, request)) = Request::decode(packet) else {
            return "ended with exit code 2";
        };
        match request {
            Request::Open(open) => {
                sessions = Arc::new(Semaphore::new(usize::from(open.sessions)));
                let outcome = fake.open(&open).map(Answer::Opened);
                fake.answer(&channel, id, outcome).await;
            }
            Request::Describe => {
                fake.count(|c| c.describes += 1);
                let keys = fake
                    .0
                    .switches
                    .borrow()
                    .keys
                    .iter()
                    .map(FakeKey::info)
                    .collect();
                let description = Description {
                    token: token_info(),
                    keys,
                    omitted: 0,
                };
                fake.answer(&channel, id, Ok(Answer::Described(description)))
                    .await;
            }
            request => {
                let (fake, channel) = (fake.clone(), Arc::clone(&channel));
                let session = Arc::clone(&sessions).acquire_owned();
                operations.spawn(async move {
                    let _session = session.await;
                    let outcome = fake.operate(request).await;
                    fake.answer(&channel, id, outcome).await;
                });
            }
        }
    }
}

fn token_info() -> TokenInfo {
    TokenInfo {
        label: "fake".into(),
        serial: SERIAL.into(),
        manufacturer: "hsm-token-client".into(),
        model: "fake".into(),
    }
}

impl Fake {
    async fn answer(&self, channel: &Channel, id: u64, outcome: Result<Answer, Fault>) {
        let recovery = self.0.switches.borrow().recovery;
        let response = Response {
            id,
            recovery,
            outcome,
        };
        // A daemon that is gone needs no answer.
        let _ = channel.send(&response.encode()).await;
    }

    // As a host does it: what was refused before is not tried again, and each try is counted.
    fn open(&self, open: &Open) -> Result<TokenInfo, Fault> {
        let refused =
            |note: &LatchNote| note.serial == SERIAL && note.generation >= open.pin_generation;
        if open.pin.is_some() && open.latched.iter().any(refused) {
            let text = "a PIN of this generation was refused before";
            return Err(Fault::new(FaultKind::PinLatched, text).on_token(SERIAL));
        }
        self.count(|c| c.logins += u64::from(open.pin.is_some()));
        let fault = self.0.switches.borrow().open.clone();
        fault.map_or_else(|| Ok(token_info()), Err)
    }

    async fn operate(&self, request: Request) -> Result<Answer, Fault> {
        self.count(|c| match request {
            Request::Seal { .. } => c.seals += 1,
            Request::Unseal { .. } => c.unseals += 1,
            _ => c.probes += 1,
        });
        let mut switches = self.0.switches.subscribe();
        if switches.borrow().hang {
            std::future::pending::<()>().await;
        }
        // The sender lives as long as this fake, so that waiting cannot fail.
        let now = match switches.wait_for(|s| !s.held).await {
            Ok(now) => now.clone(),
            Err(_) => return Err(Fault::new(FaultKind::Device, "the fake is gone")),
        };
        if !now.delay.is_zero() {
            sleep(now.delay).await;
        }
        if let Some(fault) = now.operations {
            return Err(fault);
        }
        match request {
            Request::Seal {
                key,
                wrap,
                aad,
                plaintext,
            } => {
                let key = find(&now.keys, &key, wrap)?;
                key.seal(&aad, plaintext.expose()).map(Answer::Sealed)
            }
            Request::Unseal {
                key,
                wrap,
                aad,
                sealed,
                plaintext_len,
            } => {
                let plaintext = find(&now.keys, &key, wrap)?.unseal(&aad, &sealed)?;
                if plaintext.len() != plaintext_len as usize {
                    let text = "the plaintext has another length than was asked for";
                    return Err(Fault::new(FaultKind::Tampered, text));
                }
                Ok(Answer::Unsealed(plaintext))
            }
            Request::Probe { key, wrap } => {
                let key = find(&now.keys, &key, wrap)?;
                let sealed = key.seal(b"", &[1; 32])?;
                key.unseal(b"", &sealed).map(|_| Answer::Probed)
            }
            Request::Open(_) | Request::Describe => {
                Err(Fault::new(FaultKind::BadRequest, "not an operation"))
            }
        }
    }
}

fn find<'a>(keys: &'a [FakeKey], wanted: &KeyRef, wrap: Wrap) -> Result<&'a FakeKey, Fault> {
    if wrap != Wrap::AES_GCM {
        return Err(Fault::new(
            FaultKind::Refused,
            "the fake knows AES-GCM only",
        ));
    }
    let key = keys
        .iter()
        .find(|key| key.id == wanted.id && key.label == wanted.label)
        .ok_or_else(|| Fault::new(FaultKind::KeyNotFound, "no key matches the search"))?;
    if key.reference().fingerprint != wanted.fingerprint {
        return Err(Fault::new(
            FaultKind::KeyChanged,
            "the key is another one than before",
        ));
    }
    Ok(key)
}
