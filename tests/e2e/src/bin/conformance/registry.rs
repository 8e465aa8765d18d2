//! A registry on the loopback that serves one layout to a containerd that asks it instead of the world's. It can do what
//! a pull needs: manifests by tag and digest, and blobs.

use crate::images::{Images, REGISTRIES};
use anyhow::{Context as _, Result};
use e2e::image::MANIFEST;
use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Arc,
};

/// What is asked for is short.
const LONGEST_LINE: u64 = 8192;

/// Serves until the program ends, and writes for containerd, below `settings`, where the registries are.
pub(crate) fn serve(images: Images, settings: &Path) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("a port for the registry")?;
    let address = format!("http://{}", listener.local_addr()?);
    for registry in REGISTRIES {
        let dir = settings.join(registry);
        fs::create_dir_all(&dir)?;
        let text = format!("server = {address:?}\n[host.{address:?}]\ncapabilities = [\"pull\", \"resolve\"]\n");
        fs::write(dir.join("hosts.toml"), text)?;
    }
    let images = Arc::new(images);
    std::thread::spawn(move || {
        for there in listener.incoming().flatten() {
            let images = Arc::clone(&images);
            // one that hangs up is its own business
            std::thread::spawn(move || answer(&there, &images));
        }
    });
    Ok(())
}

fn answer(there: &TcpStream, images: &Images) -> io::Result<()> {
    let mut lines = BufReader::new(io::Read::take(there, LONGEST_LINE)).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    // the rest of the head says nothing that matters here
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let mut to = there;
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    if path == "/v2/" {
        return head(&mut to, "200 OK", "application/json", 0, "");
    }
    let found = find(images, path).and_then(|(digest, kind)| {
        let hex = digest.trim_start_matches("sha256:");
        let blob = File::open(images.layout.join("blobs/sha256").join(hex)).ok()?;
        Some((digest, kind, blob))
    });
    let Some((digest, kind, mut blob)) = found else {
        return head(&mut to, "404 Not Found", "application/json", 0, "");
    };
    head(&mut to, "200 OK", kind, blob.metadata()?.len(), &format!("Docker-Content-Digest: {digest}\r\n"))?;
    if method == "GET" {
        io::copy(&mut blob, &mut to)?;
    }
    to.shutdown(std::net::Shutdown::Write)
}

fn head(to: &mut impl Write, status: &str, kind: &str, size: u64, more: &str) -> io::Result<()> {
    write!(to, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}Connection: close\r\n\r\n")
}

/// The digest and media type of what a path names.
fn find<'a>(images: &'a Images, path: &'a str) -> Option<(&'a str, &'static str)> {
    let path = path.strip_prefix("/v2/")?;
    let is_digest = |text: &str| {
        text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    if let Some((_, digest)) = path.split_once("/blobs/") {
        return is_digest(digest).then_some((digest, "application/octet-stream"));
    }
    let (name, reference) = path.split_once("/manifests/")?;
    if is_digest(reference) {
        return Some((reference, MANIFEST));
    }
    Some((images.manifests.get(&format!("{name}:{reference}"))?, MANIFEST))
}
