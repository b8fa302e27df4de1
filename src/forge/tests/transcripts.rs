//! hsmctl as a person sees it: each `tests/cmd/FOLDER/NAME.txt` holds commands and what they print.
//!
//! A line `$ hsmctl ARGS [< FILE]` is run in that folder; standard output, standard error and
//! `[exit N]` follow. Below `keys`, the command finds a health socket named `health.sock` that answers
//! with `NAME.json`. All is compared byte by byte; `UPDATE_TRANSCRIPTS=1 cargo test -p hsmctl --test
//! transcripts` writes it anew: read the difference before committing it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

const HSMCTL: &str = env!("CARGO_BIN_EXE_hsmctl");

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cmd")
}

fn transcripts() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in fs::read_dir(folder()).expect("the folder of transcripts") {
        for file in fs::read_dir(folder.expect("an entry").path()).expect("a folder") {
            let path = file.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "txt") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() >= 45, "only {} transcripts", found.len());
    found
}

/// Runs one command line of a transcript.
fn run(line: &str, folder: &Path) -> Output {
    let (line, stdin) = match line.split_once(" < ") {
        Some((line, file)) => {
            let file = File::open(folder.join(file)).expect("the file that is read");
            (line, Stdio::from(file))
        }
        None => (line, Stdio::null()),
    };
    let mut words = line.split_whitespace();
    assert_eq!(words.next(), Some("hsmctl"), "{line}");
    Command::new(HSMCTL)
        .args(words)
        .current_dir(folder)
        .env_clear()
        .stdin(stdin)
        .output()
        .expect("hsmctl starts")
}

fn shown(line: &str, output: &Output) -> String {
    let mut text = format!("$ {line}\n");
    text += &String::from_utf8_lossy(&output.stdout);
    text += &String::from_utf8_lossy(&output.stderr);
    text += &format!("[exit {}]\n", output.status.code().expect("no signal"));
    text
}

/// Serves one file as the daemon's status until the folder goes away.
fn serve(folder: &Path, page: &Path) {
    let body = fs::read(page).expect("the page");
    let listener = UnixListener::bind(folder.join("health.sock")).expect("binds");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 512];
            let count = stream.read(&mut request).unwrap_or(0);
            assert!(request[..count].starts_with(b"GET /status HTTP/1.1\r\n"));
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
        }
    });
}

#[test]
fn every_command_prints_its_transcript() {
    let mut changed = Vec::new();
    for path in transcripts() {
        let recorded = fs::read_to_string(&path).expect("reads");
        let here = path.parent().expect("a folder");
        let page = path.with_extension("json");
        let place = tempfile::tempdir().expect("a folder");
        let cwd = match page.exists() {
            true => {
                serve(place.path(), &page);
                place.path()
            }
            false => here,
        };
        let commands = recorded.lines().filter_map(|line| line.strip_prefix("$ "));
        let found: Vec<String> = commands.map(|line| shown(line, &run(line, cwd))).collect();
        let found = found.join("\n");
        if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
            fs::write(&path, &found).expect("writes");
        } else if recorded != found {
            changed.push(format!("{}:\n{found}", path.display()));
        }
    }
    assert!(
        changed.is_empty(),
        "other output than recorded:\n\n{}",
        changed.join("\n")
    );
}

#[test]
fn what_went_wrong_is_on_standard_error_and_the_rest_on_standard_output() {
    let output = run(
        "hsmctl kms plan one.yaml unannounced.yaml",
        &folder().join("plan"),
    );
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(out.starts_with("one.yaml -> unannounced.yaml\n"), "{out}");
    assert!(!out.contains("cannot be activated"), "{out}");
    assert!(err.starts_with("error: pkcs11:"), "{err}");
    let output = run(
        "hsmctl kms plan one.yaml announced.yaml",
        &folder().join("plan"),
    );
    assert!(output.stderr.is_empty() && output.status.success());
}

#[test]
fn every_answer_in_json_is_json_also_when_it_is_a_refusal() {
    let mut answers = 0;
    for path in transcripts() {
        let recorded = fs::read_to_string(&path).expect("reads");
        for line in recorded.lines().filter_map(|line| line.strip_prefix("$ ")) {
            if line.contains(" -o json") && !line.contains("health.sock") {
                let output = run(line, path.parent().expect("a folder"));
                if output.stdout.is_empty() {
                    let err = String::from_utf8_lossy(&output.stderr);
                    assert!(err.contains("cannot be read"), "{line}: {err}");
                    continue;
                }
                let value: serde_json::Value =
                    serde_json::from_slice(&output.stdout).expect("JSON");
                assert!(value.is_object());
                answers += 1;
            }
        }
    }
    assert!(answers > 3, "only {answers} answers");
}

#[test]
fn a_reader_who_hangs_up_is_no_error() {
    let mut child = Command::new(HSMCTL)
        .args(["kms", "plan", "one.yaml", "announced.yaml"])
        .current_dir(folder().join("plan"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("hsmctl starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}

#[test]
fn a_full_disk_is_an_error() {
    let full = File::options()
        .write(true)
        .open("/dev/full")
        .expect("opens");
    let output = Command::new(HSMCTL)
        .args(["kms", "plan", "one.yaml", "announced.yaml"])
        .current_dir(folder().join("plan"))
        .stdout(full)
        .output()
        .expect("hsmctl starts");
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(
        err.starts_with("error: cannot print: No space left"),
        "{err}"
    );
}

#[test]
fn no_colour_is_ever_printed() {
    for args in [&["--help"][..], &["kms", "plan", "no", "no"], &["nonsense"]] {
        let output = Command::new(HSMCTL)
            .args(args)
            .env("CLICOLOR_FORCE", "1")
            .output()
            .expect("hsmctl starts");
        assert!(!output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b));
    }
}
