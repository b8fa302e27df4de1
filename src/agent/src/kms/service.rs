//! gRPC over one admitted connection: routes, deadlines, limits, the three methods.
//!
//! The server is hyper's HTTP/2 with tonic's gRPC on top, without tonic's router: three paths need
//! none, and each connection can be drained (GOAWAY) on its own.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hsm_token_client::TokenError;
use hsm_wire::envelope::{MAX_KEY_ID_LEN, MAX_PLAINTEXT_LEN};
use hsm_wire::fault::FaultKind;
use http::{Request, Response};
use hyper::body::Incoming as HttpBody;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic::{Code, Status};

use super::messages::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, Incoming, KmsCodec,
    MAX_REQUEST_LEN, Outgoing, StatusRequest, StatusResponse,
};
use super::{Counters, Face, WhenLost};
use crate::keyring::KeyringError;

/// Requests of one connection under way at once. A 1.37 API server decodes ten watch events a
/// resource type in parallel; 256 is 25 types at once, and 256 × 36 KiB of request is 9 MiB at worst.
const MAX_STREAMS: u32 = 256;
/// Deadline of a call whose client set none, and the longest one that is believed.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest list of request headers, in bytes; grpc-go sends some 300.
const MAX_HEADERS: u32 = 8 * 1024;

/// Serves one connection until it ends; when `drain` turns true, lets what is under way finish and
/// sends the client elsewhere.
pub(crate) async fn serve<S>(face: Arc<Face>, stream: S, mut drain: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let face = Arc::clone(&face);
        async move { Ok::<_, Infallible>(route(&face, request).await) }
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let drained = async {
        let _ = drain.wait_for(|drain| *drain).await;
    };
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = drained => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "KMS connection ended");
    }
}

async fn route(face: &Arc<Face>, request: Request<HttpBody>) -> Response<Body> {
    match request.uri().path() {
        "/v2.KeyManagementService/Status" => call(face, request, status).await,
        "/v2.KeyManagementService/Encrypt" => call(face, request, encrypt).await,
        "/v2.KeyManagementService/Decrypt" => call(face, request, decrypt).await,
        _ => Status::unimplemented("only v2.KeyManagementService is served here").into_http(),
    }
}

async fn call<I, O, M, F>(face: &Arc<Face>, request: Request<HttpBody>, method: M) -> Response<Body>
where
    I: Incoming,
    O: Outgoing,
    M: FnOnce(Arc<Face>, I, Instant) -> F + Clone + Send + 'static,
    F: Future<Output = Result<O, Status>> + Send + 'static,
{
    Grpc::new(KmsCodec::<I, O>::default())
        .max_decoding_message_size(MAX_REQUEST_LEN)
        .unary(
            Method {
                face: Arc::clone(face),
                method,
            },
            request,
        )
        .await
}

/// Adapts a method to tonic: takes the deadline out of the metadata and holds the call to it.
struct Method<M> {
    face: Arc<Face>,
    method: M,
}

impl<I, O, M, F> UnaryService<I> for Method<M>
where
    I: Incoming,
    O: Outgoing,
    M: FnOnce(Arc<Face>, I, Instant) -> F + Clone,
    F: Future<Output = Result<O, Status>> + Send + 'static,
{
    type Response = O;
    type Future = Within<F>;

    fn call(&mut self, request: tonic::Request<I>) -> Self::Future {
        let timeout = request
            .metadata()
            .get("grpc-timeout")
            .and_then(|value| parse_timeout(value.to_str().ok()?))
            .map_or(MAX_TIMEOUT, |timeout| timeout.min(MAX_TIMEOUT));
        let deadline = Instant::now() + timeout;
        let method = self.method.clone();
        let call = method(Arc::clone(&self.face), request.into_inner(), deadline);
        Within(Box::pin(tokio::time::timeout_at(deadline, call)))
    }
}

/// A call that ends by its deadline.
struct Within<F>(Pin<Box<tokio::time::Timeout<F>>>);

impl<F, O> Future for Within<F>
where
    F: Future<Output = Result<O, Status>>,
{
    type Output = Result<tonic::Response<O>, Status>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(context).map(|ended| match ended {
            Ok(answer) => answer.map(tonic::Response::new),
            Err(_) => Err(Status::deadline_exceeded("the call's deadline has passed")),
        })
    }
}

/// The `grpc-timeout` header: at most 8 digits and a unit (gRPC over HTTP/2, "Requests").
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

async fn status(face: Arc<Face>, _: StatusRequest, _: Instant) -> Result<StatusResponse, Status> {
    count(&face.counters.status);
    let active = face
        .keyring()
        .and_then(|keyring| keyring.active().map_err(|error| error.to_string()));
    match (face.health().outcome, active) {
        (Ok(()), Ok(active)) => Ok(StatusResponse {
            healthz: "ok".to_owned(),
            key_id: active.key_id,
        }),
        (outcome, active) => {
            let reason = outcome.err().or(active.err()).unwrap_or_default();
            let last = face
                .keyring()
                .ok()
                .and_then(|keyring| keyring.last_key_id());
            match (face.when_lost(), last) {
                (WhenLost::Coast, Some(key_id)) => Ok(StatusResponse {
                    healthz: reason,
                    key_id,
                }),
                _ => Err(Status::unavailable(reason)),
            }
        }
    }
}

async fn encrypt(
    face: Arc<Face>,
    request: EncryptRequest,
    deadline: Instant,
) -> Result<EncryptResponse, Status> {
    let EncryptRequest { plaintext, uid } = request;
    let call = Call::begin(&face, Kind::Encrypt, uid);
    let sealed = async {
        let plaintext = plaintext.ok_or_else(|| Status::invalid_argument("plaintext is empty"))?;
        if plaintext.is_empty() {
            return Err(Status::invalid_argument("plaintext is empty"));
        }
        if plaintext.len() > MAX_PLAINTEXT_LEN {
            return Err(Status::invalid_argument(format!(
                "plaintext has {} bytes, over the limit of {MAX_PLAINTEXT_LEN}",
                plaintext.len()
            )));
        }
        let keyring = face.keyring().map_err(Status::unavailable)?;
        keyring.seal(plaintext, deadline).await.map_err(to_status)
    }
    .await;
    let (ciphertext, key_id) = call.end(sealed)?;
    Ok(EncryptResponse { ciphertext, key_id })
}

async fn decrypt(
    face: Arc<Face>,
    request: DecryptRequest,
    deadline: Instant,
) -> Result<DecryptResponse, Status> {
    let DecryptRequest {
        ciphertext,
        uid,
        key_id,
        annotations,
    } = request;
    let call = Call::begin(&face, Kind::Decrypt, uid);
    let opened = async {
        if annotations {
            return Err(Status::invalid_argument(
                "annotations are given, but this plugin writes none: another KMS plugin wrote the ciphertext",
            ));
        }
        if key_id.len() > MAX_KEY_ID_LEN {
            return Err(Status::invalid_argument(format!(
                "key_id has {} bytes, over the limit of {MAX_KEY_ID_LEN}",
                key_id.len()
            )));
        }
        face.open(ciphertext, key_id, deadline)
            .await
            .map_err(to_status)
    }
    .await;
    let (plaintext, listed) = call.end(opened)?;
    if !listed {
        count(&face.counters.decrypt_unlisted);
    }
    Ok(DecryptResponse { plaintext })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Encrypt,
    Decrypt,
}

/// Counts and logs one call, also one that is dropped before it has an answer: its deadline passed or
/// its client hung up. While a module hangs, every call ends so.
struct Call {
    /// None once it has ended.
    face: Option<Arc<Face>>,
    kind: Kind,
    uid: String,
}

impl Call {
    fn begin(face: &Arc<Face>, kind: Kind, uid: String) -> Self {
        Self {
            face: Some(Arc::clone(face)),
            kind,
            uid,
        }
    }

    fn end<T>(mut self, outcome: Result<T, Status>) -> Result<T, Status> {
        if let Some(face) = self.face.take() {
            self.tell(&face.counters, outcome.as_ref().err());
        }
        outcome
    }

    fn tell(&self, counters: &Counters, failed: Option<&Status>) {
        count(match (self.kind, failed) {
            (Kind::Encrypt, None) => &counters.encrypt_ok,
            (Kind::Encrypt, Some(_)) => &counters.encrypt_failed,
            (Kind::Decrypt, None) => &counters.decrypt_ok,
            (Kind::Decrypt, Some(_)) => &counters.decrypt_failed,
        });
        let (call, uid) = (self.kind, &self.uid);
        match failed {
            None => tracing::debug!(?call, uid, "answered"),
            Some(status) => {
                tracing::warn!(?call, uid, code = ?status.code(), reason = status.message(), "failed");
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(face) = self.face.take() {
            let given_up = Status::deadline_exceeded("the deadline passed or the client hung up");
            self.tell(&face.counters, Some(&given_up));
        }
    }
}

fn to_status(error: KeyringError) -> Status {
    let code = match &error {
        KeyringError::Unready(_) => Code::Unavailable,
        KeyringError::Malformed(_) => Code::InvalidArgument,
        KeyringError::OtherCluster { .. } => Code::FailedPrecondition,
        KeyringError::UnknownKey(_) => Code::NotFound,
        KeyringError::Token(error) => match &**error {
            TokenError::Down { .. } => Code::Unavailable,
            TokenError::Overloaded { .. } => Code::ResourceExhausted,
            TokenError::Deadline { .. } => Code::DeadlineExceeded,
            TokenError::Fault { fault, .. } => match fault.kind {
                FaultKind::Tampered => {
                    return Status::invalid_argument(
                        "ciphertext or key_id was changed: it does not authenticate under its key",
                    );
                }
                FaultKind::Refused | FaultKind::BadRequest => Code::FailedPrecondition,
                _ => Code::Unavailable,
            },
        },
    };
    Status::new(code, chain(&error))
}

/// The error and its causes on one line: the API server logs the text of a status and nothing else.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_read_as_the_protocol_writes_it() {
        assert_eq!(parse_timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(parse_timeout("2999m"), Some(Duration::from_millis(2999)));
        assert_eq!(parse_timeout("15u"), Some(Duration::from_micros(15)));
        for wrong in ["", "S", "3", "3s", "-3S", "123456789S", "3 S", "é"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong:?}");
        }
    }
}
