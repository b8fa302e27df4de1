//! The limit of the token: the module's AES-GCM in this process, with the key found once and a session per thread.
//!
//! The `cryptoki` crate asks the module for the length of every result before it asks for the result; SoftHSM answers that
//! without doing the work, so it costs well under a microsecond.

use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;

use crate::args::{KeyArgs, Op, RawArgs};
use crate::error::BenchError;
use crate::load::print_json;
use crate::samples::Summary;

const PLAINTEXT: [u8; 32] = [0x5a; 32];
/// As long as what hsmd authenticates: the envelope's header and a key_id.
const AAD: [u8; 60] = [0x41; 60];
const WARM_UP: Duration = Duration::from_millis(500);

pub(crate) fn run(args: &RawArgs) -> Result<(), BenchError> {
    let (module, slot) = token(&args.key)?;
    // The login is the token's, not the session's: this one stays open and keeps it for the others.
    let login = session(&module, slot)?;
    login
        .login(UserType::User, Some(&pin(&args.key)?))
        .map_err(pkcs11("log in"))?;
    let key = find_key(&login, &args.key.key_label)?;

    measure(&module, slot, key, args, WARM_UP)?;
    print_json(&measure(
        &module,
        slot,
        key,
        args,
        Duration::from_secs_f64(args.row.seconds),
    )?)
}

fn measure(
    module: &Pkcs11,
    slot: Slot,
    key: ObjectHandle,
    args: &RawArgs,
    length: Duration,
) -> Result<Summary, BenchError> {
    let sessions = (0..args.row.concurrency)
        .map(|_| session(module, slot))
        .collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    let end = begun + length;
    let mut latencies = Vec::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = sessions
            .into_iter()
            .zip(0..)
            .map(|(session, number)| {
                scope.spawn(move || work(&session, key, args.row.op, number, end))
            })
            .collect();
        for worker in workers {
            // A panic in a worker is a bug here; there is nothing to save by going on.
            latencies.append(
                &mut worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
            );
        }
        Ok::<_, BenchError>(())
    })?;
    Ok(Summary::of(latencies, begun.elapsed()))
}

fn work(
    session: &Session,
    key: ObjectHandle,
    op: Op,
    worker: u32,
    end: Instant,
) -> Result<Vec<Duration>, BenchError> {
    let sealed = seal(session, key, worker, u64::MAX)?;
    let mut latencies = Vec::with_capacity(1 << 17);
    let mut now = Instant::now();
    while now < end {
        match op {
            Op::Decrypt => unseal(session, key, worker, u64::MAX, &sealed)?,
            Op::Encrypt => drop(seal(session, key, worker, latencies.len() as u64)?),
            // Nothing of the kind is asked of a token.
            Op::Status => break,
        }
        let then = std::mem::replace(&mut now, Instant::now());
        latencies.push(now - then);
    }
    Ok(latencies)
}

fn seal(
    session: &Session,
    key: ObjectHandle,
    worker: u32,
    count: u64,
) -> Result<Vec<u8>, BenchError> {
    let mut iv = iv(worker, count);
    let gcm = GcmParams::new(&mut iv, &AAD, 128.into()).map_err(pkcs11("set up AES-GCM"))?;
    session
        .encrypt(&Mechanism::AesGcm(gcm), key, &PLAINTEXT)
        .map_err(pkcs11("encrypt"))
}

fn unseal(
    session: &Session,
    key: ObjectHandle,
    worker: u32,
    count: u64,
    sealed: &[u8],
) -> Result<(), BenchError> {
    let mut iv = iv(worker, count);
    let gcm = GcmParams::new(&mut iv, &AAD, 128.into()).map_err(pkcs11("set up AES-GCM"))?;
    let plaintext = session
        .decrypt(&Mechanism::AesGcm(gcm), key, sealed)
        .map_err(pkcs11("decrypt"))?;
    if plaintext != PLAINTEXT {
        return Err(BenchError::WrongPlaintext {
            who: "the PKCS#11 module",
        });
    }
    Ok(())
}

/// Never twice in one run; the key is thrown away after it.
fn iv(worker: u32, count: u64) -> [u8; 12] {
    let mut iv = [0; 12];
    iv[..4].copy_from_slice(&worker.to_be_bytes());
    iv[4..].copy_from_slice(&count.to_be_bytes());
    iv
}

fn token(args: &KeyArgs) -> Result<(Pkcs11, Slot), BenchError> {
    let module = Pkcs11::new(&args.module).map_err(pkcs11("load the library and call it"))?;
    module
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .map_err(pkcs11("initialize"))?;
    for slot in module
        .get_slots_with_initialized_token()
        .map_err(pkcs11("list tokens"))?
    {
        if module
            .get_token_info(slot)
            .map_err(pkcs11("read a token"))?
            .label()
            == args.token_label
        {
            return Ok((module, slot));
        }
    }
    Err(BenchError::NotFound {
        what: "token",
        label: args.token_label.clone(),
    })
}

fn session(module: &Pkcs11, slot: Slot) -> Result<Session, BenchError> {
    module
        .open_ro_session(slot)
        .map_err(pkcs11("open a session"))
}

fn pin(args: &KeyArgs) -> Result<AuthPin, BenchError> {
    let pin = std::fs::read_to_string(&args.pin_file).map_err(|source| BenchError::File {
        doing: "read",
        path: args.pin_file.clone(),
        source,
    })?;
    Ok(AuthPin::new(pin.trim_end().into()))
}

fn find_key(session: &Session, label: &str) -> Result<ObjectHandle, BenchError> {
    let wanted = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::Label(label.into()),
    ];
    let found = session
        .find_objects(&wanted)
        .map_err(pkcs11("find the key"))?;
    found.first().copied().ok_or_else(|| BenchError::NotFound {
        what: "key",
        label: label.to_owned(),
    })
}

fn pkcs11(doing: &'static str) -> impl Fn(cryptoki::error::Error) -> BenchError {
    move |source| BenchError::Pkcs11 { doing, source }
}
