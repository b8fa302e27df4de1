//! What the hop through the host costs: operations over the socketpair beside the same PKCS#11 calls
//! in this process. Measurements, not checks: `hack/bench kms --wraps` runs them.

mod support;

use std::time::{Duration, Instant};

use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::types::AuthPin;
use hsm_wire::envelope::{MAC_LEN, MAC_MARK_LEN, Wrap};
use hsm_wire::host::{Answer, KeyInfo, Request};
use hsm_wire::secret::Secret;
use support::manners::Mannered;
use support::{Host, KEY_LABEL, PATIENCE, PIN, SoftHsm, Start, open};

const ROUNDS: usize = 5_000;
const AAD: [u8; 60] = [7; 60];
const PLAINTEXT: [u8; 32] = [9; 32];
const RSA_LABEL: &str = "rsa";
/// What a wrap may cost beyond its calls, in microseconds.
const BAR: f64 = 40.0;

#[test]
#[ignore = "a measurement, run by hack/bench kms --wraps in release mode"]
fn every_wrap_through_the_host_beside_raw_calls() {
    println!(
        "\n{:9} {:22} {:>9} {:>9} {:>9}   host <= raw + {BAR}",
        "token", "unseal 32 bytes by", "raw us", "host us", "p99 us"
    );
    for (name, token) in [
        ("SoftHSM", Mannered::softhsm()),
        ("Kryoptic", Mannered::kryoptic()),
    ] {
        token.add_mac_key("01");
        token.add("rsa:2048", RSA_LABEL, "02", &["--sensitive"]);
        token.add_mac_key("02");
        let mut host = token.host("");
        let keys = host.describe().keys;
        let raw = Raw::open(&token);
        for (label, wrap, what) in [
            (KEY_LABEL, Wrap::AES_GCM, "AES-GCM"),
            (KEY_LABEL, Wrap::AES_KWP, "AES-KWP"),
            (KEY_LABEL, Wrap::AES_CBC_HMAC, "AES-CBC-PAD + HMAC"),
            (RSA_LABEL, Wrap::RSA_OAEP_HMAC, "RSA-2048-OAEP + HMAC"),
        ] {
            let info = keys.iter().find(|info| info.key.label == label);
            match info
                .ok_or("no such key".to_owned())
                .and_then(|info| seal(&mut host, info, wrap))
            {
                Err(reason) => println!(
                    "{name:9} {what:22} {:>9} {:>9} {:>9}   {reason}",
                    "-", "-", "-"
                ),
                Ok((info, sealed)) => {
                    let hosted = through_host(&mut host, &info, wrap, &sealed);
                    let raw = raw.times(wrap, &sealed);
                    let met = match &raw {
                        Some(raw) if p50(&hosted) <= p50(raw) + BAR => "met",
                        Some(_) => "not met",
                        None => "raw calls not possible here",
                    };
                    let raw = raw.map_or("-".to_owned(), |raw| format!("{:.1}", p50(&raw)));
                    println!(
                        "{name:9} {what:22} {raw:>9} {:>9.1} {:>9.1}   {met}",
                        p50(&hosted),
                        micros(hosted[hosted.len() * 99 / 100])
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "a measurement, run by hack/bench kms --wraps in release mode"]
fn from_exec_to_an_open_token() {
    let token = SoftHsm::new();
    for (name, start) in [
        ("plain", Start::plain(token.env())),
        ("isolated", Start::for_token(&token)),
    ] {
        let times = sorted((0..50).map(|_| {
            let began = Instant::now();
            let _host = Host::open(&start, open());
            began.elapsed()
        }));
        println!("exec to open token, {name:8} p50 {:.0} us", p50(&times));
    }
}

fn seal(host: &mut Host, info: &KeyInfo, wrap: Wrap) -> Result<(KeyInfo, Vec<u8>), String> {
    let request = Request::Seal {
        key: info.key.clone(),
        wrap,
        aad: AAD.to_vec(),
        plaintext: Secret::copy_of(&PLAINTEXT),
    };
    match host.ask(&request).outcome {
        Ok(Answer::Sealed(sealed)) => Ok((info.clone(), sealed)),
        Ok(other) => Err(format!("{other:?}")),
        Err(fault) => Err(fault.to_string()),
    }
}

fn through_host(host: &mut Host, info: &KeyInfo, wrap: Wrap, sealed: &[u8]) -> Vec<Duration> {
    let request = Request::Unseal {
        key: info.key.clone(),
        wrap,
        aad: AAD.to_vec(),
        sealed: sealed.to_vec(),
        plaintext_len: PLAINTEXT.len() as u32,
    };
    sorted((0..ROUNDS).map(|_| {
        let packet = request.encode(1);
        let began = Instant::now();
        host.send_raw(&packet);
        // As the daemon does it: it looks for the answer before it sleeps.
        while host.is_silent_for(Duration::ZERO) {
            std::thread::yield_now();
        }
        let took = began.elapsed();
        host.receive(PATIENCE).expect("response");
        took
    }))
}

/// The same token, opened in this process.
struct Raw {
    session: Session,
    kek: ObjectHandle,
    mac: ObjectHandle,
    rsa: ObjectHandle,
    rsa_mac: ObjectHandle,
}

impl Raw {
    fn open(token: &Mannered) -> Self {
        let (module, slot) = token.open_here();
        let session = module.open_rw_session(slot).expect("session");
        let login = session.login(UserType::User, Some(&AuthPin::new(PIN.into())));
        login.expect("login");
        let find = |template: &[Attribute]| session.find_objects(template).expect("find")[0];
        let mac = |id: u8| {
            find(&[
                Attribute::KeyType(KeyType::GENERIC_SECRET),
                Attribute::Id(vec![id]),
            ])
        };
        Self {
            kek: find(&[Attribute::KeyType(KeyType::AES)]),
            mac: mac(1),
            rsa: find(&[Attribute::Class(ObjectClass::PRIVATE_KEY)]),
            rsa_mac: mac(2),
            session,
        }
    }

    /// Times of the calls that opening takes at least, or none if the binding cannot make them.
    fn times(&self, wrap: Wrap, sealed: &[u8]) -> Option<Vec<Duration>> {
        let open: Box<dyn Fn() -> cryptoki::error::Result<()>> = match wrap {
            Wrap::AES_GCM => Box::new(|| {
                let mut iv = [0; 12];
                iv.copy_from_slice(&sealed[..12]);
                let params = GcmParams::new(&mut iv, &AAD, 128.into())?;
                let mechanism = Mechanism::AesGcm(params);
                self.session
                    .decrypt(&mechanism, self.kek, &sealed[12..])
                    .map(drop)
            }),
            Wrap::AES_KWP => Box::new(|| {
                let template = [
                    Attribute::Class(ObjectClass::SECRET_KEY),
                    Attribute::KeyType(KeyType::GENERIC_SECRET),
                    Attribute::Token(false),
                    Attribute::Sensitive(false),
                    Attribute::Extractable(true),
                ];
                let mechanism = Mechanism::AesKeyWrapPad;
                let key = self
                    .session
                    .unwrap_key(&mechanism, self.kek, sealed, &template)?;
                self.session.get_attributes(key, &[AttributeType::Value])?;
                self.session.destroy_object(key)
            }),
            Wrap::AES_CBC_HMAC => Box::new(|| {
                let (body, _) = sealed.split_at(sealed.len() - MAC_MARK_LEN - MAC_LEN);
                let signed = [&AAD[..], body].concat();
                self.session
                    .sign(&Mechanism::Sha256Hmac, self.mac, &signed)?;
                let mut iv = [0; 16];
                iv.copy_from_slice(&body[..16]);
                let mechanism = Mechanism::AesCbcPad(iv);
                self.session
                    .decrypt(&mechanism, self.kek, &body[16..])
                    .map(drop)
            }),
            _ => Box::new(|| {
                let (body, _) = sealed.split_at(sealed.len() - MAC_MARK_LEN - MAC_LEN);
                let signed = [&AAD[..], body].concat();
                self.session
                    .sign(&Mechanism::Sha256Hmac, self.rsa_mac, &signed)?;
                let decrypt = |hash, mgf| {
                    let params = PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty());
                    let mechanism = Mechanism::RsaPkcsOaep(params);
                    self.session
                        .decrypt(&mechanism, self.rsa, &body[1..])
                        .map(drop)
                };
                decrypt(MechanismType::SHA256, PkcsMgfType::MGF1_SHA256)
                    .or_else(|_| decrypt(MechanismType::SHA1, PkcsMgfType::MGF1_SHA1))
            }),
        };
        open().ok()?;
        Some(sorted((0..ROUNDS).map(|_| {
            let began = Instant::now();
            open().expect("as before");
            began.elapsed()
        })))
    }
}

fn sorted(times: impl Iterator<Item = Duration>) -> Vec<Duration> {
    let mut times: Vec<_> = times.collect();
    times.sort();
    times
}

fn p50(times: &[Duration]) -> f64 {
    micros(times[times.len() / 2])
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}
