//! The health socket: plain HTTP/1.1 for probes and for people, on a unix socket that only root opens.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 while the process lives: whatever is missing, a restart would not bring it |
//! | `/readyz` | 200 when every face is ready, else 503 with the reasons |
//! | `/status` | everything known, as JSON |

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

/// What the daemon knows of itself.
pub(crate) trait Source: Send + Sync + 'static {
    /// Every face that is not ready, with the reason.
    fn unready(&self) -> Vec<String>;
    /// The status page.
    fn status(&self) -> serde_json::Value;
}

/// A client that has not sent its request by then is dropped.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers one connection.
pub(crate) async fn serve<S>(source: Arc<dyn Source>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let response = answer(&*source, &request);
        async move { Ok::<_, Infallible>(response) }
    });
    let ended = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "health connection ended");
    }
}

fn answer(source: &dyn Source, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET is served here\n".to_owned(),
        );
    }
    match request.uri().path() {
        "/healthz" => plain(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => match source.unready() {
            reasons if reasons.is_empty() => plain(StatusCode::OK, "ok\n".to_owned()),
            reasons => plain(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n"),
        },
        "/status" => respond(
            StatusCode::OK,
            "application/json",
            format!("{:#}\n", source.status()),
        ),
        _ => plain(
            StatusCode::NOT_FOUND,
            "paths: /healthz /readyz /status\n".to_owned(),
        ),
    }
}

fn plain(code: StatusCode, text: String) -> Response<Full<Bytes>> {
    respond(code, "text/plain; charset=utf-8", text)
}

fn respond(code: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = code;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static(kind),
    );
    response
}

/// A time as RFC 3339 in UTC, to the second.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
