//! What a client of a published port sees: HTTP, by one request.

use anyhow::{Result, bail};
use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

/// How long a server may take to serve: ten at once on a machine without KVM take their time.
const LIMIT: Duration = Duration::from_secs(120);

/// The body that `http://address:port/` has, asked for until it has one.
pub fn get(address: &str, port: u16) -> Result<String> {
    let end = Instant::now() + LIMIT;
    loop {
        match get_path(address, port, "/") {
            Ok(body) => return Ok(body),
            Err(error) if Instant::now() > end => bail!("{address}:{port}: not within {LIMIT:?}: {error:#}"),
            // nobody tells a client that a server has begun to serve
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// The body that `http://address:port/path` has now.
pub fn get_path(address: &str, port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&format!("{address}:{port}").parse()?, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.trim().to_owned()),
        _ => bail!("answered {answer:?}"),
    }
}
