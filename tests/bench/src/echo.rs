//! The limit of the transport: tonic's own server on a unix socket, which answers in the shapes of KMS v2 and does nothing.
//!
//! "Sealed" is the plaintext behind a filler, so that Decrypt can give back what the generator expects.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic_prost::ProstCodec;
use tower::Service;

use crate::error::BenchError;
use crate::messages::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};

/// Header, nonce and tag of a real envelope: so many bytes come on top of the plaintext.
const FILLER: usize = 56;
const KEY_ID: &str = "00112233445566778899aabbccddeeff";

pub(crate) async fn run(socket: &Path) -> Result<(), BenchError> {
    let listener = UnixListener::bind(socket).map_err(|source| BenchError::File {
        doing: "listen on",
        path: socket.to_owned(),
        source,
    })?;
    tonic::transport::Server::builder()
        .serve_with_incoming(Echo, UnixListenerStream::new(listener))
        .await
        .map_err(BenchError::Echo)
}

#[derive(Clone)]
struct Echo;

impl Service<Request<Body>> for Echo {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    /// What tonic-build would generate.
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match request.uri().path() {
            "/v2.KeyManagementService/Status" => Box::pin(async {
                Ok(Grpc::new(ProstCodec::default())
                    .unary(Answer(status), request)
                    .await)
            }),
            "/v2.KeyManagementService/Encrypt" => Box::pin(async {
                Ok(Grpc::new(ProstCodec::default())
                    .unary(Answer(encrypt), request)
                    .await)
            }),
            "/v2.KeyManagementService/Decrypt" => Box::pin(async {
                Ok(Grpc::new(ProstCodec::default())
                    .unary(Answer(decrypt), request)
                    .await)
            }),
            _ => Box::pin(ready(Ok(
                Status::unimplemented("no such method").into_http()
            ))),
        }
    }
}

struct Answer<From, To>(fn(From) -> To);

impl<From, To: Send + 'static> UnaryService<From> for Answer<From, To> {
    type Response = To;
    type Future = Ready<Result<tonic::Response<To>, Status>>;

    fn call(&mut self, request: tonic::Request<From>) -> Self::Future {
        ready(Ok(tonic::Response::new(self.0(request.into_inner()))))
    }
}

fn status(_: StatusRequest) -> StatusResponse {
    StatusResponse {
        version: "v2".into(),
        healthz: "ok".into(),
        key_id: KEY_ID.into(),
    }
}

fn encrypt(request: EncryptRequest) -> EncryptResponse {
    let mut ciphertext = vec![0; FILLER];
    ciphertext.extend_from_slice(&request.plaintext);
    EncryptResponse {
        ciphertext,
        key_id: KEY_ID.into(),
        annotations: Default::default(),
    }
}

fn decrypt(request: DecryptRequest) -> DecryptResponse {
    DecryptResponse {
        plaintext: request
            .ciphertext
            .get(FILLER..)
            .unwrap_or_default()
            .to_vec(),
    }
}
