//! etcd and kube-apiserver, and requests to both.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::workbench::{Process, Workbench, run_with};
use crate::{KUBE_APISERVER_UID, part, wait_for};

/// First bytes of everything that kube-apiserver stores through a KMS v2 plugin.
pub const STORED_PREFIX: &str = "k8s:enc:kms:v2:talos-hsm:";

/// A running etcd with an empty store.
pub struct Etcd {
    process: Process,
    url: String,
}

impl Etcd {
    /// Starts it and waits until it answers.
    pub fn start(bench: &Workbench) -> Result<Self> {
        let url = format!("http://127.0.0.1:{}", free_port()?);
        let peers = format!("http://127.0.0.1:{}", free_port()?);
        let process = bench.start(
            "etcd",
            &part("ETCD")?,
            &[
                format!("--data-dir={}", bench.path().join("etcd").display()),
                format!("--listen-client-urls={url}"),
                format!("--advertise-client-urls={url}"),
                format!("--listen-peer-urls={peers}"),
                format!("--initial-advertise-peer-urls={peers}"),
                format!("--initial-cluster=default={peers}"),
                // The store lives as long as the workbench: nothing to keep over a power cut.
                "--unsafe-no-fsync".to_owned(),
                "--log-level=warn".to_owned(),
            ],
        )?;
        let mut etcd = Self { process, url };
        wait_for("etcd answers", Duration::from_secs(30), || {
            etcd.process.still_runs()?;
            etcd.raw("health").map(|_| ())
        })?;
        Ok(etcd)
    }

    /// The bytes stored under a key, if there are any, straight from the store.
    pub fn raw(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let answer = self.range(json!({ "key": BASE64.encode(key) }))?;
        Ok(answer["kvs"][0]["value"]
            .as_str()
            .map(|value| BASE64.decode(value))
            .transpose()?)
    }

    /// Every value stored under a prefix.
    pub fn values(&self, prefix: &str) -> Result<Vec<Vec<u8>>> {
        // The end of a prefix's range is the prefix with its last byte raised.
        let mut end = prefix.as_bytes().to_vec();
        *end.last_mut().context("an empty prefix")? += 1;
        let answer =
            self.range(json!({ "key": BASE64.encode(prefix), "range_end": BASE64.encode(&end) }))?;
        let Some(kvs) = answer["kvs"].as_array() else {
            return Ok(Vec::new());
        };
        kvs.iter()
            .map(|kv| Ok(BASE64.decode(kv["value"].as_str().context("a key without a value")?)?))
            .collect()
    }

    /// Writes bytes under a key, past the API server: what restoring a snapshot comes to.
    pub fn put_raw(&self, key: &str, value: &[u8]) -> Result<()> {
        let request = json!({ "key": BASE64.encode(key), "value": BASE64.encode(value) });
        self.ask("put", request).map(|_| ())
    }

    fn range(&self, request: Value) -> Result<Value> {
        self.ask("range", request)
    }

    fn ask(&self, method: &str, request: Value) -> Result<Value> {
        let text = run_with(
            Command::new("curl")
                .args(["-sSf", "--max-time", "10", "-d", &request.to_string()])
                .arg(format!("{}/v3/kv/{method}", self.url)),
        )?;
        serde_json::from_str(&text).context("etcd's answer is not JSON")
    }
}

/// Certificates and service-account key, made once for all servers of a workbench.
pub struct Credentials {
    folder: PathBuf,
}

impl Credentials {
    /// Makes a CA, a server certificate for 127.0.0.1 and an admin's client certificate.
    pub fn make(bench: &Workbench) -> Result<Self> {
        let folder = bench.folder("kubernetes", KUBE_APISERVER_UID)?;
        let script = r#"
            set -eu
            openssl ecparam -name prime256v1 -genkey -noout -out ca.key
            openssl req -x509 -new -key ca.key -subj /CN=kubernetes-ca -days 1 -out ca.crt
            sign() { # name subject extensions
                openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"
                openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
                printf '%s\n' "$3" > "$1.ext"
                openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 1 \
                    -extfile "$1.ext" -out "$1.crt"
            }
            sign server /CN=kube-apiserver 'subjectAltName=IP:127.0.0.1,IP:10.96.0.1'
            sign admin /O=system:masters/CN=admin 'extendedKeyUsage=clientAuth'
            openssl genrsa -out sa.key 2048
            openssl rsa -in sa.key -pubout -out sa.pub
        "#;
        run_with(Command::new("sh").args(["-c", script]).current_dir(&folder))
            .context("cannot make the cluster's certificates")?;
        for entry in std::fs::read_dir(&folder)? {
            std::os::unix::fs::chown(
                entry?.path(),
                Some(KUBE_APISERVER_UID),
                Some(KUBE_APISERVER_UID),
            )?;
        }
        Ok(Self { folder })
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }
}

/// A running kube-apiserver that seals Secrets through a KMS v2 plugin.
pub struct ApiServer {
    process: Process,
    url: String,
    ca: String,
    admin: [String; 2],
}

impl ApiServer {
    /// Starts a server on `etcd`, with the plugin at `socket`, and waits until it is ready.
    pub fn start(
        bench: &Workbench,
        etcd: &Etcd,
        credentials: &Credentials,
        socket: &Path,
        name: &str,
    ) -> Result<Self> {
        let mut server = Self::launch(bench, etcd, credentials, socket, name)?;
        wait_for("kube-apiserver is ready", Duration::from_secs(90), || {
            server.process.still_runs()?;
            server
                .readyz()
                .and_then(|(ready, text)| if ready { Ok(()) } else { bail!("{text}") })
        })?;
        // It appears some seconds after /readyz; without it no Secret can be written.
        wait_for(
            "the namespace `default` exists",
            Duration::from_secs(60),
            || server.get("/api/v1/namespaces/default").map(|_| ()),
        )?;
        Ok(server)
    }

    /// As [`Self::start`], without waiting.
    pub fn launch(
        bench: &Workbench,
        etcd: &Etcd,
        credentials: &Credentials,
        socket: &Path,
        name: &str,
    ) -> Result<Self> {
        let encryption = bench.write(
            &format!("encryption-{name}.yaml"),
            &format!(
                "apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - kms: {{apiVersion: v2, name: talos-hsm, endpoint: \"unix://{}\", timeout: 3s}}
",
                socket.display()
            ),
            KUBE_APISERVER_UID,
        )?;
        let port = free_port()?;
        let c = |name: &str| credentials.file(name);
        let args = [
            format!("--etcd-servers={}", etcd.url),
            format!("--secure-port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            format!("--client-ca-file={}", c("ca.crt")),
            format!("--tls-cert-file={}", c("server.crt")),
            format!("--tls-private-key-file={}", c("server.key")),
            format!("--cert-dir={}", credentials.folder.display()),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", c("sa.pub")),
            format!("--service-account-signing-key-file={}", c("sa.key")),
            "--authorization-mode=RBAC".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--encryption-provider-config={}", encryption.display()),
        ];
        let process = bench.start_in_pod(name, &part("KUBE_APISERVER")?, &args)?;
        Ok(Self {
            process,
            url: format!("https://127.0.0.1:{port}"),
            ca: c("ca.crt"),
            admin: [c("admin.crt"), c("admin.key")],
        })
    }

    /// Whether `/readyz` is green, and what it says, check by check.
    pub fn readyz(&self) -> Result<(bool, String)> {
        let (code, text) = self.request("GET", "/readyz?verbose", None)?;
        Ok((code == 200, text))
    }

    /// Writes a new Secret in the namespace `default`.
    pub fn create_secret(&self, name: &str, value: &str) -> Result<()> {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": name },
            "stringData": { "password": value },
        });
        match self.request("POST", "/api/v1/namespaces/default/secrets", Some(&secret))? {
            (201, _) => Ok(()),
            (code, text) => bail!("kube-apiserver refused the Secret {name} ({code}): {text}"),
        }
    }

    /// Reads a Secret's value.
    pub fn secret(&self, name: &str) -> Result<String> {
        let secret = self.get(&format!("/api/v1/namespaces/default/secrets/{name}"))?;
        let value = secret["data"]["password"]
            .as_str()
            .context("the Secret has no password")?;
        Ok(String::from_utf8(BASE64.decode(value)?)?)
    }

    /// Writes a Secret as it is read, which seals it anew if its key_id is no longer the current one:
    /// what storage migration does to each.
    pub fn rewrite_secret(&self, name: &str) -> Result<()> {
        let path = format!("/api/v1/namespaces/default/secrets/{name}");
        let secret = self.get(&path)?;
        match self.request("PUT", &path, Some(&secret))? {
            (200, _) => Ok(()),
            (code, text) => bail!("kube-apiserver did not rewrite {name} ({code}): {text}"),
        }
    }

    /// GET; a status other than 200 is an error.
    pub fn get(&self, path: &str) -> Result<Value> {
        match self.request("GET", path, None)? {
            (200, text) => serde_json::from_str(&text).context("the answer is not JSON"),
            (code, text) => bail!("GET {path} was answered {code}: {text}"),
        }
    }

    fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, String)> {
        let mut command = Command::new("curl");
        command
            .args([
                "-sS",
                "--max-time",
                "15",
                "-X",
                method,
                "-w",
                "\n%{http_code}",
            ])
            .args([
                "--cacert",
                &self.ca,
                "--cert",
                &self.admin[0],
                "--key",
                &self.admin[1],
            ]);
        if let Some(body) = body {
            command.args([
                "-H",
                "Content-Type: application/json",
                "-d",
                &body.to_string(),
            ]);
        }
        let answer = run_with(command.arg(format!("{}{path}", self.url)))?;
        let (text, code) = answer
            .rsplit_once('\n')
            .context("curl wrote no status code")?;
        Ok((code.parse()?, text.to_owned()))
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
