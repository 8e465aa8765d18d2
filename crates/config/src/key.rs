//! A row of the table of keys: names, type, default, allowed values, text, drivers. Owns what a row can say; the rows are in
//! [`crate::table`] and [`crate::driver`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::driver::Driver;
use crate::file::{Entry, Value};
use crate::value::{is_absolute, number, one_of, quoted, refuse, text, text_line, truth};
use crate::{Config, Error};

/// A TOML table of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// `[hypervisor.NAME]`, one for each driver.
    Hypervisor,
    /// `[agent.kata]`.
    Agent,
    /// `[runtime]`.
    Runtime,
    /// `[factory]`.
    Factory,
    /// `[netmon]` of Kata 2.0.
    Netmon,
    /// `[image]` of Kata 2.5 to 3.0.
    Image,
}

impl Table {
    /// All, in the order of the documentation.
    pub(crate) const ALL: [Self; 6] =
        [Self::Hypervisor, Self::Agent, Self::Runtime, Self::Factory, Self::Netmon, Self::Image];

    /// The header without its brackets.
    pub(crate) fn header(self, driver: Driver) -> String {
        match self {
            Self::Hypervisor => format!("hypervisor.{}", driver.name()),
            Self::Agent => "agent.kata".into(),
            Self::Runtime => "runtime".into(),
            Self::Factory => "factory".into(),
            Self::Netmon => "netmon".into(),
            Self::Image => "image".into(),
        }
    }
}

/// One key.
#[derive(Clone, Copy)]
pub(crate) struct Key {
    /// Its table.
    pub(crate) table: Table,
    /// Its name there: the Go runtime's where the two runtimes of Kata differ. `x.*` is every key below `x`.
    pub(crate) name: &'static str,
    /// The same setting under another name, which is the Rust runtime's.
    pub(crate) alias: Option<Alias>,
    /// The drivers that know it.
    pub(crate) drivers: &'static [Driver],
    /// What setting it does.
    pub(crate) effect: Effect,
    /// What it means, or why it has no effect: plain text in sentences.
    pub(crate) doc: &'static str,
    /// The annotation of a pod that may set it, without `io.katacontainers.config.`. Nothing reads annotations yet.
    #[allow(dead_code, reason = "data for pods that set keys by annotations; a test checks it")]
    pub(crate) annotation: Option<&'static str>,
}

/// Another name of a key.
#[derive(Clone, Copy)]
pub(crate) struct Alias {
    /// Its table.
    pub(crate) table: Table,
    /// Its name there.
    pub(crate) name: &'static str,
    /// Where it has another unit than the key.
    pub(crate) slot: Option<Slot>,
}

/// What setting a key does.
#[derive(Clone, Copy)]
pub(crate) enum Effect {
    /// It sets a field of [`Config`].
    Sets(Slot),
    /// These values, in TOML, ask for what happens anyway; others are refused.
    Only {
        /// The values.
        values: &'static [&'static str],
        /// The refusal, where "is not supported yet" does not say enough.
        refusal: Option<&'static str>,
    },
    /// Every value is met: the key refines something that is off or refused, or limits something that never happens.
    Met,
    /// It changes nothing, and who sets it is told so in the log.
    Told {
        /// Values that ask for what happens anyway: nothing is told.
        met: &'static [&'static str],
        /// Kata's own defaults: told as information. Everything else is told as a warning.
        usual: &'static [&'static str],
        /// Where it matters at all.
        when: When,
    },
}

/// Where a key without effect matters.
#[derive(Clone, Copy)]
pub(crate) enum When {
    /// On every host.
    Always,
    /// On a host that has this file.
    HostHas(&'static str),
    /// On a host that has the path which is the key's value.
    ValueExists,
}

/// A place in [`Config`].
pub(crate) type At<T> = fn(&mut Config) -> &mut T;

/// A type of value, its limits and the field that it sets.
#[derive(Clone, Copy)]
pub(crate) enum Slot {
    /// `true` or `false`.
    Truth(At<bool>),
    /// A whole number.
    Number {
        /// The smallest.
        least: u32,
        /// The largest.
        most: u32,
        /// Where it goes.
        at: At<u32>,
    },
    /// Mebibytes, with 0 for "no limit of its own".
    Mib(At<u64>),
    /// Whole seconds from 1 to the number.
    Seconds(u32, At<Duration>),
    /// Milliseconds from 1 to the number.
    Milliseconds(u32, At<Duration>),
    /// A string without line breaks.
    Line(At<String>),
    /// An absolute path.
    Path(At<PathBuf>),
    /// An absolute path; an empty string is none.
    OptionalPath(At<Option<PathBuf>>),
    /// One of some words.
    Word(&'static dyn Words),
    /// What the others cannot say.
    Other {
        /// What is allowed, for the documentation.
        takes: &'static str,
        /// Checks and sets.
        read: fn(&mut Config, &Entry) -> Result<(), Error>,
        /// The field in TOML.
        show: fn(&mut Config) -> String,
    },
}

impl Slot {
    /// Checks the entry and sets the field.
    pub(crate) fn read(self, config: &mut Config, entry: &Entry) -> Result<(), Error> {
        match self {
            Self::Truth(at) => *at(config) = truth(entry)?,
            Self::Number { least, most, at } => *at(config) = number(entry, least.into(), most.into())? as u32,
            Self::Mib(at) => *at(config) = number(entry, 0, u32::MAX.into())?,
            Self::Seconds(most, at) => *at(config) = Duration::from_secs(number(entry, 1, most.into())?),
            Self::Milliseconds(most, at) => *at(config) = Duration::from_millis(number(entry, 1, most.into())?),
            Self::Line(at) => *at(config) = text_line(entry)?,
            Self::Path(at) => *at(config) = is_absolute(entry)?,
            Self::OptionalPath(at) => {
                *at(config) = if text(entry)?.is_empty() { None } else { Some(is_absolute(entry)?) };
            }
            Self::Word(words) => words.read(config, entry)?,
            Self::Other { read, .. } => read(config, entry)?,
        }
        Ok(())
    }

    /// The field's value in TOML.
    pub(crate) fn show(self, config: &mut Config) -> String {
        match self {
            Self::Truth(at) => at(config).to_string(),
            Self::Number { at, .. } => at(config).to_string(),
            Self::Mib(at) => at(config).to_string(),
            Self::Seconds(_, at) => at(config).as_secs().to_string(),
            Self::Milliseconds(_, at) => at(config).as_millis().to_string(),
            Self::Line(at) => format!("{:?}", at(config)),
            Self::Path(at) => quoted(at(config)),
            Self::OptionalPath(at) => quoted(at(config).as_deref().unwrap_or(Path::new(""))),
            Self::Word(words) => format!("{:?}", words.show(config)),
            Self::Other { show, .. } => show(config),
        }
    }

    /// What is allowed, in words.
    pub(crate) fn takes(self) -> String {
        match self {
            Self::Truth(_) => "true or false".into(),
            Self::Number { least, most: u32::MAX, .. } => format!("whole number from {least}"),
            Self::Number { least, most, .. } => format!("whole number from {least} to {most}"),
            Self::Mib(_) => "MiB".into(),
            Self::Seconds(most, _) => format!("seconds, 1 to {most}"),
            Self::Milliseconds(most, _) => format!("milliseconds, 1 to {most}"),
            Self::Line(_) => "string".into(),
            Self::Path(_) => "absolute path".into(),
            Self::OptionalPath(_) => "absolute path, or \"\"".into(),
            Self::Word(words) => {
                let names: Vec<_> = words.names().iter().map(|name| format!("{name:?}")).collect();
                match names.split_last() {
                    Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
                    _ => names.concat(),
                }
            }
            Self::Other { takes, .. } => takes.into(),
        }
    }
}

/// A type whose values are words of the file.
pub trait Word: Copy + PartialEq + 'static {
    /// All words; of two for one value the first is shown.
    const WORDS: &'static [(&'static str, Self)];

    /// The word.
    fn as_str(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(name, _)| name)
    }
}

/// A field that is a [`Word`], and words of Kata's that are refused with a reason.
pub(crate) struct WordAt<T: Word> {
    /// Where it goes.
    pub(crate) at: At<T>,
    /// Refused words, and why.
    pub(crate) refused: &'static [(&'static [&'static str], &'static str)],
}

impl<T: Word> WordAt<T> {
    /// A field that takes all words of its type.
    pub(crate) const fn new(at: At<T>) -> Self {
        Self { at, refused: &[] }
    }
}

/// [`WordAt`] of any type.
pub(crate) trait Words: Sync {
    /// The words that are allowed.
    fn names(&self) -> Vec<&'static str>;
    /// Checks and sets.
    fn read(&self, config: &mut Config, entry: &Entry) -> Result<(), Error>;
    /// The field's word.
    fn show(&self, config: &mut Config) -> &'static str;
}

impl<T: Word> Words for WordAt<T> {
    fn names(&self) -> Vec<&'static str> {
        T::WORDS.iter().map(|(name, _)| *name).collect()
    }

    fn read(&self, config: &mut Config, entry: &Entry) -> Result<(), Error> {
        let word = text(entry)?;
        if let Some((_, why)) = self.refused.iter().find(|(words, _)| words.contains(&word)) {
            return Err(refuse(entry, *why));
        }
        *(self.at)(config) = one_of(entry, T::WORDS)?;
        Ok(())
    }

    fn show(&self, config: &mut Config) -> &'static str {
        (self.at)(config).as_str()
    }
}

impl Key {
    const fn new(table: Table, name: &'static str, effect: Effect, doc: &'static str) -> Self {
        Self { table, name, alias: None, drivers: Driver::ALL, effect, doc, annotation: None }
    }

    /// A key that sets a field.
    pub(crate) const fn sets(table: Table, name: &'static str, slot: Slot, doc: &'static str) -> Self {
        Self::new(table, name, Effect::Sets(slot), doc)
    }

    /// A key of which some values ask for what happens anyway, and others are refused.
    pub(crate) const fn only(
        table: Table,
        name: &'static str,
        values: &'static [&'static str],
        doc: &'static str,
    ) -> Self {
        Self::new(table, name, Effect::Only { values, refusal: None }, doc)
    }

    /// A key that cannot matter here whatever its value.
    pub(crate) const fn met(table: Table, name: &'static str, doc: &'static str) -> Self {
        Self::new(table, name, Effect::Met, doc)
    }

    /// A key that has no effect, which is told unless its value is one of `met`.
    pub(crate) const fn told(
        table: Table,
        name: &'static str,
        (met, usual): (&'static [&'static str], &'static [&'static str]),
        doc: &'static str,
    ) -> Self {
        Self::new(table, name, Effect::Told { met, usual, when: When::Always }, doc)
    }

    /// The same, refused in other words.
    pub(crate) const fn refused_as(self, words: &'static str) -> Self {
        let Effect::Only { values, .. } = self.effect else { return self };
        Self { effect: Effect::Only { values, refusal: Some(words) }, ..self }
    }

    /// The same, told on some hosts only.
    pub(crate) const fn when(self, when: When) -> Self {
        let Effect::Told { met, usual, .. } = self.effect else { return self };
        Self { effect: Effect::Told { met, usual, when }, ..self }
    }

    /// The same with the Rust runtime's name.
    pub(crate) const fn also(self, table: Table, name: &'static str, slot: Option<Slot>) -> Self {
        Self { alias: Some(Alias { table, name, slot }), ..self }
    }

    /// The same for some drivers only.
    pub(crate) const fn of(self, drivers: &'static [Driver]) -> Self {
        Self { drivers, ..self }
    }

    /// The same with the annotation that may set it.
    pub(crate) const fn annotation(self, name: &'static str) -> Self {
        Self { annotation: Some(name), ..self }
    }

    /// With its table, as it is set: `hypervisor.qemu.kernel`.
    pub(crate) fn path(&self, driver: Driver) -> String {
        format!("{}.{}", self.table.header(driver), self.name)
    }

    /// The same under its other name.
    pub(crate) fn alias_path(&self, driver: Driver) -> Option<String> {
        self.alias.map(|alias| format!("{}.{}", alias.table.header(driver), alias.name))
    }

    /// The field that it sets.
    pub(crate) fn slot(&self) -> Option<Slot> {
        match self.effect {
            Effect::Sets(slot) => Some(slot),
            _ => None,
        }
    }

    /// Whether this is its name, or one of its names.
    pub(crate) fn is_called(&self, table: Table, name: &str) -> bool {
        let is_own = match self.name.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == self.name,
        };
        (self.table == table && is_own) || self.is_alias(table, name)
    }

    /// Whether this is its other name.
    pub(crate) fn is_alias(&self, table: Table, name: &str) -> bool {
        self.alias.is_some_and(|alias| alias.table == table && alias.name == name)
    }

    /// Does what the entry asks for, or refuses it. What has no effect is told later: [`crate::untold`].
    pub(crate) fn read(&self, config: &mut Config, entry: &Entry, is_alias: bool) -> Result<(), Error> {
        match self.effect {
            Effect::Sets(slot) => {
                let other = self.alias.filter(|_| is_alias).and_then(|alias| alias.slot);
                other.unwrap_or(slot).read(config, entry)
            }
            Effect::Only { values, refusal } => {
                if values.contains(&entry.value.to_string().as_str()) {
                    return Ok(());
                }
                let usual = || format!("is not supported yet: remove it or set it to {}", values.join(" or "));
                Err(refuse(entry, refusal.map_or_else(usual, str::to_owned)))
            }
            // a table where a value belongs is a mistake all the same
            Effect::Met | Effect::Told { .. } if entry.value == Value::Table => Err(refuse(entry, "must be a value")),
            Effect::Met | Effect::Told { .. } => Ok(()),
        }
    }
}
