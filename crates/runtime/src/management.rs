//! What tools ask a pod's shim: Kata's management requests, HTTP on a socket in the pod's run folder. Served for pods that
//! something can be asked about only; who may open the folder may ask.
//!
//! One request a connection, a few kilobytes: no HTTP library is worth it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Error;

/// The socket's name, as Kata's.
const SOCKET: &str = "shim-monitor.sock";
/// Where the run folders of pods are.
const SANDBOXES: &str = "/run/kata-containers/sandboxes";
/// Largest request or answer, bytes.
const LIMIT: usize = 64 << 10;
/// How long one may take to say what he wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a shim may take to answer; its own limits are shorter.
const ANSWER: Duration = Duration::from_secs(120);

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// How full a volume is.
    VolumeStats(PathBuf),
    /// A volume's device is larger now.
    VolumeResize(PathBuf, u64),
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Resize {
    #[serde(rename = "VolumePath")]
    path: PathBuf,
    #[serde(rename = "Size")]
    size: u64,
}

/// Listens in a run folder.
pub(crate) fn listen(run: &Path) -> io::Result<tokio::net::UnixListener> {
    let listener = at(run, |path| UnixListener::bind(path))?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

/// A socket's path has room for 107 bytes, and a run folder alone may need more.
fn at<T>(run: &Path, what: impl FnOnce(&str) -> io::Result<T>) -> io::Result<T> {
    let folder = File::open(run)?;
    what(&format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}

/// Reads one request, and answers it with what `work` makes of it.
pub(crate) async fn serve<F>(mut stream: tokio::net::UnixStream, work: impl FnOnce(Request) -> F)
where
    F: Future<Output = Result<String, Error>>,
{
    let request = tokio::time::timeout(PATIENCE, read(&mut stream)).await;
    let (status, body) = match request.ok().and_then(Result::ok).as_deref().and_then(parse) {
        None => ("400 Bad Request", "unknown request\n".to_owned()),
        Some(request) => match work(request).await {
            Ok(body) => ("200 OK", body),
            Err(error @ Error::NotFound(_)) => ("404 Not Found", format!("{error}\n")),
            Err(error) => ("500 Internal Server Error", format!("{error}\n")),
        },
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let answer = async { stream.write_all((head + &body).as_bytes()).await };
    // who has gone wants no answer
    let _ = tokio::time::timeout(PATIENCE, answer).await;
}

async fn read(stream: &mut tokio::net::UnixStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while missing(&bytes) > 0 {
        if bytes.len() > LIMIT {
            return Err(io::Error::other("the request is too large"));
        }
        let mut part = [0; 4096];
        match stream.read(&mut part).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&part[..count]),
        }
    }
    Ok(bytes)
}

/// Head and body; `None` while the head is not whole.
fn split(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some((std::str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 4..]))
}

/// How many bytes are still to come, at least.
fn missing(bytes: &[u8]) -> usize {
    let Some((head, body)) = split(bytes) else { return 1 };
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    let length = lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let wanted: usize = length.and_then(|(_, value)| value.trim().parse().ok()).unwrap_or_default();
    wanted.saturating_sub(body.len())
}

/// The Go runtime asks for statistics by GET, the Rust runtime by POST.
fn parse(bytes: &[u8]) -> Option<Request> {
    let (head, body) = split(bytes)?;
    let mut words = head.lines().next()?.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    if let Some(path) = target.strip_prefix("/direct-volume/stats?path=") {
        return ["GET", "POST"].contains(&method).then_some(Request::VolumeStats(unescape(path)?.into()));
    }
    if (method, target) == ("POST", "/direct-volume/resize") {
        let resize: Resize = serde_json::from_slice(body).ok()?;
        return Some(Request::VolumeResize(resize.path, resize.size));
    }
    None
}

/// Of a URL's query.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

fn escape(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let one = |byte: &u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(*byte).to_string(),
        other => format!("%{other:02X}"),
    };
    path.as_os_str().as_bytes().iter().map(one).collect()
}

/// Asks the shim of a pod about a volume.
///
/// # Errors
/// It does not answer, or says what is wrong.
pub fn volume_stats(sandbox: &str, volume: &Path) -> Result<String, Error> {
    ask(sandbox, &format!("GET /direct-volume/stats?path={} HTTP/1.1\r\n\r\n", escape(volume)))
}

/// Tells the shim of a pod that a volume's device is larger now.
///
/// # Errors
/// As [`volume_stats`].
pub fn volume_resize(sandbox: &str, volume: &Path, size: u64) -> Result<(), Error> {
    let body = serde_json::to_string(&Resize { path: volume.to_owned(), size })
        .map_err(|error| Error::Invalid(format!("{}: {error}", volume.display())))?;
    let head = format!("POST /direct-volume/resize HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
    ask(sandbox, &(head + &body)).map(drop)
}

fn ask(sandbox: &str, request: &str) -> Result<String, Error> {
    let run = Path::new(SANDBOXES).join(sandbox);
    let answer = (|| {
        let mut stream = at(&run, |path| UnixStream::connect(path))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(request.as_bytes())?;
        let mut bytes = Vec::new();
        stream.take(LIMIT as u64).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    })()
    .map_err(Error::host(format!("connecting to the shim of pod {sandbox}")))?;
    let wrong = || Error::Invalid(format!("invalid answer of the shim of pod {sandbox}"));
    let (head, body) = split(&answer).ok_or_else(wrong)?;
    let body = String::from_utf8_lossy(body).into_owned();
    match head.split(' ').nth(1) {
        Some("200") => Ok(body),
        Some(_) => Err(Error::WrongState(body.trim_end().to_owned())),
        None => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_runtimes_requests() {
        let path = Path::new("/var/lib/k u/ä");
        for method in ["GET", "POST"] {
            let text = format!("{method} /direct-volume/stats?path={} HTTP/1.1\r\nHost: shim\r\n\r\n", escape(path));
            assert_eq!(parse(text.as_bytes()), Some(Request::VolumeStats(path.into())));
        }
        let body = r#"{"VolumePath":"/v","Size":42}"#;
        let text = format!("POST /direct-volume/resize HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        assert_eq!(parse(text.as_bytes()), Some(Request::VolumeResize("/v".into(), 42)));
        assert_eq!(missing(&text.as_bytes()[..text.len() - 3]), 3);
        assert_eq!(parse(b"GET /direct-volume/resize HTTP/1.1\r\n\r\n"), None);
        assert_eq!(parse(b"DELETE /direct-volume/stats?path=/v HTTP/1.1\r\n\r\n"), None);
    }

    #[tokio::test]
    async fn a_question_is_answered() {
        let run = tempfile::tempdir().expect("a folder");
        let listener = listen(run.path()).expect("listening");
        let mut asking = at(run.path(), |path| UnixStream::connect(path)).expect("connected");
        asking.write_all(b"GET /direct-volume/stats?path=%2Fv HTTP/1.1\r\n\r\n").expect("asked");
        let (stream, _) = listener.accept().await.expect("accepted");
        serve(stream, |request| async move {
            assert_eq!(request, Request::VolumeStats("/v".into()));
            Err(Error::NotFound("volume /v".into()))
        })
        .await;
        let mut answer = String::new();
        asking.read_to_string(&mut answer).expect("read");
        assert!(answer.starts_with("HTTP/1.1 404") && answer.ends_with("\r\n\r\nvolume /v: not found\n"), "{answer}");
    }

    proptest! {
        #[test]
        fn any_request_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (parse(&bytes), missing(&bytes));
        }
    }
}
